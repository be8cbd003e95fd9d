"""Trainings killed at random moments.

`dvc repro` of one stage is killed with all its processes by SIGKILL, again and again; now and then it may end. A kill counts as
survived if the stage's checkpoints then have the bytes of an undisturbed training, no finished epoch was trained twice, and the
store has for each training one run, finished, with every epoch once. For each end, the trainings are removed from the cache, and
MLflow's experiment is a new one.
"""

import os
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.core.files import md5
from pipeline.training.cache import Record, read_record
from tests.faults.checkout import SMALL, Checkout, Outcome, complete, copy_checkout, kill

KILLS_PER_TRAINING = 3
EPOCHS = {"baselines": 2, "distillation": 6}
SEEDS = [0, 1]
STAGES = {  # and where their checkpoints go
    "train_baselines@simple_cnn": "baselines/simple_cnn",
    "train_baselines@resnet18": "baselines/resnet18",
    "train_teacher": "distillation/teacher",
    "distill_student": "distillation/student_distilled",
    "train_student_alone": "distillation/student_alone",
}


def kills(folder: Path, count: int, stages: Sequence[str] = tuple(STAGES), random_seed: int = 0) -> list[Outcome]:
    """Kill the stages, `count` times in all, as many stages at a time as there are cores; one outcome per stage."""
    epochs = {f"{track}__epochs": number for track, number in EPOCHS.items()}

    def kill_stage(number: int) -> Outcome:
        share = count // len(stages) + (number < count % len(stages))
        checkout = copy_checkout(folder / stages[number], **SMALL, **epochs, seeds=SEEDS)
        return _kill(checkout, stages[number], share, random.Random(f"{random_seed} {number}"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(kill_stage, range(len(stages))))


def _kill(checkout: Checkout, stage: str, count: int, moments: random.Random) -> Outcome:
    command = ("repro", "--force", "--single-item", stage)
    folder = checkout.folder / "models" / STAGES[stage]
    _forget(checkout, 0)
    checkout.dvc("repro", stage)
    expected = _checksums(folder)
    start = _forget(checkout, 1)
    checkout.dvc(*command)
    seconds = time.monotonic() - start
    assert _checksums(folder) == expected
    injected = wrong = repeated = late = 0
    pending, rounds = 0, 2  # kills since the stage ended last; experiments in the store
    start = _forget(checkout, rounds)
    while injected < count or pending:
        disturbed = injected < count and pending < KILLS_PER_TRAINING
        process = checkout.start("dvc", *command)
        moment = time.monotonic() + (moments.uniform(0, seconds) if disturbed else 600)
        before = epochs_done(checkout.folder)
        while process.poll() is None and time.monotonic() < moment:
            done = epochs_done(checkout.folder)
            repeated += any(done.get(key, 0) < number for key, number in before.items())
            before = done
            time.sleep(0.02)
        if process.poll() is None:
            kill(process)
            injected, pending = injected + 1, pending + 1
            late += sum(record.finished for record in records(checkout.folder)) == len(SEEDS)
            continue
        output, _ = process.communicate()
        if not pending:  # or else most kills would come too late where the machine was busy at first
            seconds = min(seconds, time.monotonic() - start)
        if process.returncode or _checksums(folder) != expected:
            print(output)
            wrong += pending
        pending, rounds = 0, rounds + 1
        start = _forget(checkout, rounds)
    lost = repeated + _incomplete(checkout, Path(STAGES[stage]), rounds)
    details = f"{repeated} epochs trained twice" + (f"; {late} kills came after the stage's work" if late else "")
    return Outcome(f"SIGKILL: {stage}", injected, max(injected - wrong - lost, 0), lost, wrong, details)


def _forget(checkout: Checkout, number: int) -> float:
    """Empty the cache of trainings and change to another experiment; the time now."""
    shutil.rmtree(checkout.folder / ".trainings", ignore_errors=True)
    checkout.set(tracking__experiment=f"round {number}")
    return time.monotonic()


def _incomplete(checkout: Checkout, stage: Path, rounds: int) -> int:
    """How many trainings' runs are missing, doubled or incomplete, of rounds 0 to `rounds` - 1."""
    runs, uri = checkout.mlflow_runs(), f"sqlite:///{checkout.folder}/mlflow.db"
    names = [f"{stage.name}/seed{seed}" for seed in SEEDS]
    sound = [run for run in runs if run.info.run_name in names and complete(uri, run, EPOCHS[stage.parent.name])]
    doubled = sum(run.info.run_name in names for run in runs) - len(sound)
    return abs(rounds * len(SEEDS) - len(sound)) + doubled


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: md5(path) for path in folder.glob("*")}


def records(folder: Path) -> list[Record]:
    """The records of a checkout's trainings."""
    paths = (folder / ".trainings").glob("*/record.json")
    return [record for path in paths if (record := read_record(path.parents[1], path.parent.name))]


def epochs_done(folder: Path) -> dict[str, int]:
    """The finished epochs of each training of a checkout, by its key."""
    return {record.digest: len(record.history) for record in records(folder)}
