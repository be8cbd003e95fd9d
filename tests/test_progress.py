"""A killed training goes on where it was, and ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline.networks.checkpoints import new_classifier
from pipeline.data.prepared import Split, TrainingData
from pipeline.training.cache import Progress, Unfinished
from pipeline.training.recipe import Recipe, records, train
from pipeline.tracking.store import Store
from pipeline.training.loop import State, fit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["compact_cnn", "resnet18"])
def test_going_on_after_any_epoch_gives_the_same_bits(data: TrainingData, architecture: str, precision: str):
    arguments = {"width": 8, "hidden": 32} if architecture == "compact_cnn" else {"stem": "imagenet"}
    recipe = {"epochs": 3, "batch_size": 128, "lr": 0.003, "seed": 5, "precision": precision}
    data = data._replace(  # 24x24: see runs.train on smaller ones
        dataset=data.dataset.model_copy(update={"image_shape": (24, 24, 1)}),
        train=Split(data.train.images.repeat_interleave(3, 1).repeat_interleave(3, 2), data.train.labels),
        val=Split(data.val.images.repeat_interleave(3, 1).repeat_interleave(3, 2), data.val.labels),
    )
    states = []

    def keep(state: State) -> None:
        states.append(State(list(state.history), state.best_epoch, {k: v.clone() for k, v in state.tensors.items()}))

    whole = new_classifier(architecture, arguments, data.dataset, 5)
    expected = fit(whole, data.train, data.val, F.cross_entropy, on_epoch=keep, **recipe)
    for state in states:
        model = new_classifier(architecture, arguments, data.dataset, 5)
        found = fit(model, data.train, data.val, F.cross_entropy, resume=state, **recipe)
        assert found == expected
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
        )


@pytest.fixture
def main_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return list((folder / ".progress").glob("*.safetensors"))


def test_only_the_same_training_finds_its_progress(main_checkout: Path):
    with Progress() as progress:
        with progress.of({"lr": 0.1}) as file:
            file.save(Unfinished({"weight": torch.ones(2)}, {"epoch": 1}))
        with progress.of({"lr": 0.1}) as file:
            assert file.load().facts == {"epoch": 1}
            assert torch.equal(file.load().tensors["weight"], torch.ones(2))
        with progress.of({"lr": 0.2}) as file:
            assert file.load() is None
        assert len(files(main_checkout)) == 1
    assert list((main_checkout / ".progress").iterdir()) == [], "removed when the stage has ended well"


def test_progress_outlives_a_failure_and_torn_progress_is_no_progress(main_checkout: Path):
    def fails() -> None:
        with Progress() as progress, progress.of({}) as file:
            file.save(Unfinished({"weight": torch.ones(2)}, {}))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    (path,) = files(main_checkout)
    path.write_bytes(path.read_bytes()[:-4])
    with Progress() as progress, progress.of({}) as file:
        assert file.load() is None


def test_a_training_that_runs_elsewhere_is_left_alone(main_checkout: Path):
    with Progress() as one, one.of({}) as file:
        assert file
        asked = "from pipeline.training.cache import Progress\nwith Progress() as p, p.of({}) as file: print(file)"
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "None"
        file.save(Unfinished({"weight": torch.ones(1)}, {}))
        assert file.load(), "the other process has not removed it"


def test_a_training_killed_in_its_first_epoch_goes_on_in_the_same_run(
    main_checkout: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = {"width": 4, "hidden": 8}
    recipe = Recipe(main_checkout / "teacher", "compact_cnn", small, 2, 64, 0.01, "fp32", 1, {"teacher.width": 4})

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.recipe.fit", killed)
        with pytest.raises(KeyboardInterrupt), records("e") as kept:
            train(recipe, data, 0, kept)
    with records("e") as kept:
        train(recipe, data, 0, kept)
    store = Store("e")
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in store.client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2]
    assert files(main_checkout) == []
