"""A killed training goes on where it was, and ends as if nothing had happened."""

import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient

from pipeline.checkpoints import new_classifier
from pipeline.data.prepared import Split, TrainingData
from pipeline.progress import Progress, Unfinished
from pipeline.training import State, fit
from tests.conftest import Checkout, copy_checkout


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
        asked = "from pipeline.progress import Progress\nwith Progress() as p, p.of({}) as file: print(file)"
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "None"
        file.save(Unfinished({"weight": torch.ones(1)}, {}))
        assert file.load(), "the other process has not removed it"


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files(folder)}


@pytest.mark.parametrize("stage", ["train_teacher", "distill_student"])
def test_stages_killed_at_random_moments_end_with_the_same_bytes_in_the_same_runs(tmp_path: Path, stage: str):
    checkout = Checkout(copy_checkout(tmp_path / "checkout"))
    params = checkout.folder / "params.yaml"
    params.write_text(re.sub(r"epochs: \d+", "epochs: 25", params.read_text()))
    checkout.run(sys.executable, "-m", "pipeline.fetch_data", "distillation")
    command = [sys.executable, "-m", f"pipeline.{stage}"]
    model = {"train_teacher": "teacher", "distill_student": "student_distilled"}[stage]
    if stage == "distill_student":
        checkout.run(sys.executable, "-m", "pipeline.train_teacher")
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///calm.db"
    checkout.run(*command)
    folder = checkout.folder / "models" / "distillation" / model
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///stormy.db"
    moments, kills, ended = random.Random(0), 0, False
    while not ended:
        for path in folder.iterdir():  # as DVC does before it runs a stage
            path.unlink()
        process = subprocess.Popen(command, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL)
        if kills < 4:
            before = written(checkout.folder)
            while process.poll() is None and not written(checkout.folder).items() - before.items():
                time.sleep(0.005)  # until an epoch is over
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
        finished = process.wait() == 0
        # Killed after it had finished and tidied up, on its way out: there is nothing to go on with.
        tidied = {path.name for path in folder.iterdir()} == set(expected) and len(files(checkout.folder)) < 2
        ended = finished or tidied
        kills += not ended
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    client = MlflowClient(f"sqlite:///{checkout.folder}/stormy.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    finished = [run for run in runs if "checkpoint_md5" in run.data.tags]
    assert Counter(run.info.run_name for run in finished) == {f"{model}/seed0": 1, f"{model}/seed1": 1}
    assert {run.info.status for run in finished} == {"FINISHED"}
    for run in finished:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "val_loss")]
        assert sorted(steps) == list(range(1, 26)), "every epoch once"
    assert kills == 4
