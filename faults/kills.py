"""Trainings killed at random moments.

`dvc repro` of one stage is killed with all its processes by SIGKILL, again and again; now and then it may end. A kill counts as
survived if the stage's checkpoints then have the bytes of a calm training, no finished epoch was trained twice, and the store has
for each training one run, finished, with every epoch once.
"""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from safetensors import SafetensorError, safe_open

from faults.checkout import SMALL, Checkout, copy_checkout, kill
from faults.outcome import Outcome
from pipeline.files import md5

KILLS_PER_TRAINING = 3
EPOCHS = {"baselines": 3, "distillation": 10}


class Stage(NamedTuple):
    """A training stage, by its name in dvc.yaml, and where its checkpoints go."""

    name: str
    models: str


STAGES = (
    Stage("train_baselines@simple_cnn", "baselines/simple_cnn"),
    Stage("train_baselines@resnet18", "baselines/resnet18"),
    Stage("train_teacher", "distillation/teacher"),
    Stage("distill_student", "distillation/student_distilled"),
    Stage("train_student_alone", "distillation/student_alone"),
)


def kills(folder: Path, count: int, random_seed: int = 0, stages: tuple[Stage, ...] = STAGES) -> list[Outcome]:
    """Kill each of the stages in turn, `count` times in all; one outcome per stage."""
    epochs = {f"{track}__epochs": number for track, number in EPOCHS.items()}
    checkout = copy_checkout(folder, **SMALL, **epochs, seeds=[0, 1])
    moments = random.Random(random_seed)
    shares = [count // len(stages) + (number < count % len(stages)) for number in range(len(stages))]
    return [_kill(checkout, stage, share, moments) for stage, share in zip(stages, shares, strict=True)]


def _kill(checkout: Checkout, stage: Stage, count: int, moments: random.Random) -> Outcome:
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///calm.db"
    checkout.dvc("repro", stage.name)
    start = time.monotonic()
    checkout.dvc("repro", "--force", "--single-item", stage.name)
    calm_seconds = time.monotonic() - start
    folder = checkout.folder / "models" / stage.models
    calm = {path.name: md5(path) for path in folder.iterdir()}
    store = f"sqlite:///stormy-{stage.models.replace('/', '-')}.db"
    checkout.environment["MLFLOW_TRACKING_URI"] = store
    injected = wrong = again = late = 0
    pending = 0  # kills since the stage ended last
    while injected < count or pending:
        process = checkout.start("dvc", "repro", "--force", "--single-item", stage.name)
        moment = time.monotonic() + moments.uniform(0, calm_seconds) if injected < count else float("inf")
        if pending == KILLS_PER_TRAINING:
            moment = float("inf")
        finished_epochs: dict[str, int] = {}
        while process.poll() is None and time.monotonic() < moment:
            seen = epochs_done(checkout.folder)
            again += any(seen.get(name, number) < number for name, number in finished_epochs.items())
            finished_epochs |= seen
            time.sleep(0.02)
        if process.poll() is None:
            before = epochs_done(checkout.folder)
            kill(process)
            injected, pending = injected + 1, pending + 1
            late += bool(finished_epochs) and not before
            continue
        output, _ = process.communicate()
        same = process.returncode == 0 and {path.name: md5(path) for path in folder.iterdir()} == calm
        if not same:
            print(output)
        wrong += pending * (not same)
        pending = 0
    lost = unsound_runs(
        f"sqlite:///{checkout.folder}/{store.removeprefix('sqlite:///')}", EPOCHS[stage.models.split("/")[0]]
    )
    told = f"{again} epochs trained twice" + (f"; {late} kills came after the stage's work" if late else "")
    return Outcome(
        f"SIGKILL: {stage.name}", injected, max(injected - wrong - lost - again, 0), lost + again, wrong, told
    )


def epochs_done(folder: Path) -> dict[str, int]:
    """The finished epochs in each progress file."""
    found = {}
    for path in folder.glob(".progress/*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                found[path.name] = len(json.loads(file.metadata()["facts"])["history"])
        except (OSError, SafetensorError):
            continue  # just being replaced or removed
    return found


def unsound_runs(uri: str, epochs: int) -> int:
    """How many runs of a store are not finished, have no checkpoint, or not every epoch once."""
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    count = 0
    for run in runs:
        steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, "val_loss"))
        sound = run.info.status == "FINISHED" and "checkpoint_md5" in run.data.tags
        count += not (sound and steps == Counter(range(1, epochs + 1)))
    return count
