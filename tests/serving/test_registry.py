"""Registering the student, with the real MLflow."""

import json
import pickle
import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.export.onnx_export import export_onnx
from pipeline.export.onnx_model import Student
from pipeline.serving.registry import NAMES, by_alias, open_champion, open_store, read_predictions, register
from tests.serving.conftest import Registry

NAME = NAMES["distillation"]


def test_only_a_better_student_takes_the_champions_place(registry: Registry):
    assert registry.register("first", 0.90)[:2] == ("1", "champion")
    for name, accuracy, expected, relation in (
        ("equal", 0.901, ["2", "challenger"], "undecided whether better than version 1: "),
        ("better", 0.97, ["3", "champion"], r"better than version 1: \+[67]\.\d+ points"),
        ("worse", 0.90, ["4", "challenger"], "worse than version 3: -"),
    ):
        *registered, reason = registry.register(name, accuracy)
        assert registered == expected
        assert re.match(relation, reason)
    assert registry.client.get_registered_model(NAME).aliases == {"champion": 3, "challenger": 4}
    assert register(registry.client, "distillation", registry.folder / "better") == ("3", "champion", "registered before")
    registry.client.delete_registered_model_alias(NAME, "champion")
    assert register(registry.client, "distillation", registry.folder / "better") == ("3", "no alias", "registered before")


def test_what_cannot_be_compared_is_a_challenger(registry: Registry):
    registry.register("first", 0.5)
    registry.register("equal", 0.5)
    for options, obstacle in (({"fingerprint": "1" * 64}, "other data"), ({"first_seed": 10}, "no seed in common")):
        _, alias, reason = registry.register(obstacle.replace(" ", "-"), 0.99, **options)
        assert alias == "challenger"
        assert obstacle in reason
    registry.client.set_registered_model_alias(NAME, "champion", "2")  # as by hand
    for evidence in (registry.folder / "mlartifacts").rglob("distillation.npz"):
        evidence.write_bytes(b"of an older format")
    _, alias, reason = registry.register("last", 0.99)
    assert alias == "challenger"
    assert reason.startswith("the predictions of version 2 cannot be read: ")


def test_a_version_says_what_it_needs_and_where_it_is_from(registry: Registry):
    checkout = registry.student("first", 0.9)
    (before,) = registry.client.search_runs([registry.experiment])
    register(registry.client, "distillation", checkout)
    after = registry.client.get_run(before.info.run_id).info
    assert (after.status, after.end_time) == (before.info.status, before.info.end_time)
    version = by_alias(registry.client, NAME, "champion")
    assert version.run_id == before.info.run_id
    assert version.tags["fingerprint"] == registry.data.dataset.fingerprint
    files = {path.name: path for path in (registry.folder / "mlartifacts").rglob("*")}
    assert {"MLmodel", "model.onnx", "distillation.npz"} <= files.keys()
    needs = files["requirements.txt"].read_text()
    assert all("==" in line for line in needs.split())
    assert "torch" not in needs


def test_what_is_opened_is_the_file_that_was_registered(registry: Registry, tmp_path: Path):
    registry.register("first", 0.9)
    version, student = open_champion(registry.client, "distillation", tmp_path / "a")
    images = registry.data.val.images.numpy()
    assert version == "1"
    np.testing.assert_array_equal(student.probabilities(images), Student(registry.onnx).probabilities(images))
    (stored,) = (registry.folder / "mlartifacts").rglob("model.onnx")
    export_onnx(registry.classifier, registry.data.dataset.image_shape, ["other"] * 10, stored)
    with pytest.raises(UserError, match=r"model\.onnx: no model that this project registered: its SHA-256"):
        open_champion(registry.client, "distillation", tmp_path / "b")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_no_code_from_the_store_is_run(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    registry.register("first", 0.9)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(registry.client.tracking_uri)
    for name, code in (("pickle", Malicious()), ("python", "from pathlib import Path\nPath('ran').touch()\n")):
        folder = tmp_path / name
        save_pyfunc(folder, code)
        version = registry.client.create_model_version(NAME, folder.as_uri()).version
        registry.client.set_registered_model_alias(NAME, "champion", version)
        with pytest.raises(UserError, match=f"models:/{NAME}/{version}/model.onnx: no model that this project registered"):
            open_champion(registry.client, "distillation", tmp_path / "downloaded")
    assert not (tmp_path / "ran").exists()


def save_pyfunc(folder: Path, code: object) -> None:
    """A pyfunc model that runs `code` when it is loaded, a pickle or a Python file."""
    folder.mkdir()
    data = folder / ("model.pkl" if isinstance(code, Malicious) else "model.py")
    data.write_bytes(pickle.dumps(code)) if isinstance(code, Malicious) else data.write_text(code)
    flavor = {"loader_module": "mlflow.sklearn" if isinstance(code, Malicious) else "model", "data": data.name, "code": "."}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": {"python_function": flavor}}))


def test_a_student_is_judged_on_its_own_predictions_and_by_the_figure_of_the_report(registry: Registry):
    registry.register("first", 0.9)
    checkout = registry.student("second", 0.99)
    path = checkout / "metrics/detail/distillation.json"
    detail = json.loads(path.read_text())
    detail["comparisons"]["student_distilled_vs_student_alone"] = {"metric": "nll", "margin": 0.0}
    path.write_text(json.dumps(detail))
    assert re.match(r"better than version 1: \+\S+ nats of", register(registry.client, "distillation", checkout)[2])
    other = registry.student("third", 0.5)
    write_atomic(other / "metrics/detail/distillation.json", json.dumps(detail))
    with pytest.raises(UserError, match=r"distillation\.npz: of other checkpoints than .*student\.safetensors"):
        register(registry.client, "distillation", other)


def test_what_is_missing_is_one_clear_error(registry: Registry):
    checkout = registry.student("first", 0.9)
    registry.client.delete_run(registry.client.search_runs([registry.experiment])[0].info.run_id)
    with pytest.raises(UserError, match="no run of the student's training: run make sync"):
        register(registry.client, "distillation", checkout)
    (checkout / "models/exported/distillation/student.onnx").unlink()
    with pytest.raises(UserError, match=r"student\.onnx: missing: dvc repro report@distillation"):
        register(registry.client, "distillation", checkout)


@pytest.mark.parametrize(
    ("uri", "message"), [("", "there is none yet"), ("http://me:secret@127.0.0.1:1", "Set MLFLOW_TRACKING_URI")]
)
def test_no_store_is_one_clear_error(no_mirror: Path, monkeypatch: pytest.MonkeyPatch, uri: str, message: str):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=message) as caught:
        open_store()
    assert "secret" not in str(caught.value)
    assert not list(no_mirror.iterdir())


PROBABILITIES = np.array([[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]] * 2, np.float32)
ARRAYS = {"labels": np.array([0, 1, 1]), "seeds": np.array([3, 5]), "student_distilled": PROBABILITIES}


def test_predictions_are_those_of_each_seed(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    labels, by_seed = read_predictions(tmp_path / "a.npz", "student_distilled")
    assert labels.tolist() == [0, 1, 1]
    assert {seed: rows.tolist() for seed, rows in by_seed.items()} == {seed: PROBABILITIES[0].tolist() for seed in (3, 5)}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("student_distilled", PROBABILITIES[:, :2]),
        ("student_distilled", PROBABILITIES[:1]),
        ("student_distilled", PROBABILITIES[:, :, :0]),
        ("student_distilled", PROBABILITIES.argmax(axis=2)),
        ("student_distilled", PROBABILITIES.astype(int)),
        ("labels", ARRAYS["labels"] / 1),
        ("seeds", ARRAYS["seeds"][None]),
        ("student_distilled", None),
    ],
)
def test_predictions_that_do_not_fit_together_are_refused(tmp_path: Path, name: str, array: np.ndarray | None):
    np.savez(tmp_path / "a.npz", **{key: value for key, value in (ARRAYS | {name: array}).items() if value is not None})
    with pytest.raises(UserError, match=r"a\.npz: not the predictions"):
        read_predictions(tmp_path / "a.npz", "student_distilled")
