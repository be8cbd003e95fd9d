"""Registering the student, with the real MLflow."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.data.prepared import TrainingData
from pipeline.serving.registry import NAME, by_alias, open_store, read_predictions, register, run_of
from tests.serving.conftest import Registry


def test_only_a_better_student_takes_the_champions_place(registry: Registry):
    assert register(registry.client, registry.candidate("first", 0.90))[:2] == ("1", "champion")
    *equal, reason = register(registry.client, registry.candidate("equal", 0.901))
    assert equal == ["2", "challenger"]
    assert "not distinguishable from version 1" in reason
    *better, reason = register(registry.client, registry.candidate("better", 0.97))
    assert better == ["3", "champion"]
    assert re.match(r"better than version 1: \+[67]\.\d+ points", reason)
    *worse, reason = register(registry.client, registry.candidate("worse", 0.90))
    assert worse == ["4", "challenger"]
    assert reason.startswith("worse than version 3")
    assert registry.aliases() == {"champion": "3", "challenger": "4"}
    again = register(registry.client, registry.candidate("better-again", 0.97, checkpoint_md5="better"))
    assert again == ("3", "champion", "registered before")


def test_an_alias_set_by_hand_decides_what_the_next_is_compared_with(registry: Registry):
    for name in ("first", "second"):
        register(registry.client, registry.candidate(name, 0.90))
    registry.client.set_registered_model_alias(NAME, "champion", "2")
    assert "from version 2" in register(registry.client, registry.candidate("third", 0.90))[2]


def test_what_cannot_be_compared_is_a_challenger(registry: Registry, data: TrainingData):
    register(registry.client, registry.candidate("first", 0.5))
    other = data.dataset.model_copy(update={"fingerprint": "1" * 64})
    _, alias, reason = register(registry.client, registry.candidate("other-data", 0.99, dataset=other))
    assert alias == "challenger"
    assert "other data" in reason
    candidate = registry.candidate("other-seeds", 0.99)
    arrays = dict(np.load(candidate.predictions))
    np.savez_compressed(candidate.predictions, **arrays | {"seeds": np.arange(5) + 10})
    _, alias, reason = register(registry.client, candidate)
    assert alias == "challenger"
    assert "no seed in common" in reason


def test_a_version_says_what_it_needs_and_where_it_is_from(registry: Registry, data: TrainingData):
    candidate = registry.candidate("first", 0.9)
    before = registry.client.get_run(candidate.run_id).info
    register(registry.client, candidate)
    after = registry.client.get_run(candidate.run_id).info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    version = by_alias(registry.client, "champion")
    assert version.run_id == candidate.run_id
    assert version.tags["checkpoint_md5"] == "first"
    assert version.tags["fingerprint"] == data.dataset.fingerprint
    files = {path.name for path in (registry.folder / "mlartifacts").rglob("*")}
    assert {"MLmodel", "requirements.txt", "serving_input_example.json", "student.onnx", "distillation.npz"} <= files
    (needs,) = (registry.folder / "mlartifacts").rglob("requirements.txt")
    assert all("==" in line for line in needs.read_text().split())
    assert "torch" not in needs.read_text()


def test_a_training_that_the_store_lacks_is_one_clear_error(registry: Registry):
    with pytest.raises(UserError, match="no run of the student's training"):
        run_of(registry.client, "another")


@pytest.mark.parametrize(
    ("uri", "message"), [("", "there is none yet"), ("http://me:secret@127.0.0.1:1", "Set MLFLOW_TRACKING_URI")]
)
def test_no_store_is_one_clear_error(no_mirror: Path, monkeypatch: pytest.MonkeyPatch, uri: str, message: str):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=message) as caught:
        open_store()
    assert "secret" not in str(caught.value)
    assert not list(no_mirror.iterdir())


LABELS, SEEDS = np.array([0, 1, 1]), np.array([3, 5])
PROBABILITIES = np.array([[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]] * 2, np.float32)


def test_predictions_say_which_images_are_classified_correctly(tmp_path: Path):
    np.savez(tmp_path / "a.npz", labels=LABELS, seeds=SEEDS, student_distilled=PROBABILITIES)
    correct = read_predictions(tmp_path / "a.npz")
    assert {seed: images.tolist() for seed, images in correct.items()} == {seed: [True, True, False] for seed in (3, 5)}


@pytest.mark.parametrize(
    "changed",
    [
        {"student_distilled": PROBABILITIES[:, :2]},
        {"student_distilled": PROBABILITIES[:1]},
        {"student_distilled": PROBABILITIES[:, :, :0]},
        {"student_distilled": PROBABILITIES.argmax(axis=2)},
        {"student_distilled": PROBABILITIES.astype(int)},
        {"labels": LABELS / 1},
        {"seeds": SEEDS[None]},
        {"teacher": PROBABILITIES, "student_distilled": None},
    ],
)
def test_predictions_that_do_not_fit_together_are_refused(tmp_path: Path, changed: dict):
    arrays = {"labels": LABELS, "seeds": SEEDS, "student_distilled": PROBABILITIES} | changed
    np.savez(tmp_path / "a.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=r"a\.npz: not the predictions"):
        read_predictions(tmp_path / "a.npz")
