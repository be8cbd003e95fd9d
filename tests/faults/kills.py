"""Trainings killed at random moments.

`dvc repro` of one stage is killed with all its processes by SIGKILL, again and again; now and then it may end. A kill counts as
survived if the stage's checkpoints then have the bytes of a calm training, no finished epoch was trained twice, and the store has
for each training one run, finished, with every epoch once.
"""

import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from faults.checkout import SMALL, Checkout, copy_checkout, kill, sound
from faults.outcome import Outcome
from pipeline.core.files import md5

KILLS_PER_TRAINING = 3
EPOCHS = {"baselines": 2, "distillation": 6}
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
        checkout = copy_checkout(folder / stages[number], **SMALL, **epochs, seeds=[0, 1])
        checkout.environment["OMP_NUM_THREADS"] = "1"
        return _kill(checkout, stages[number], share, random.Random(f"{random_seed} {number}"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(kill_stage, range(len(stages))))


def _kill(checkout: Checkout, stage: str, count: int, moments: random.Random) -> Outcome:
    track, model = STAGES[stage].split("/")
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///calm.db"
    checkout.dvc("repro", stage)
    start = time.monotonic()
    checkout.dvc("repro", "--force", "--single-item", stage)
    calm_seconds = time.monotonic() - start
    folder = checkout.folder / "models" / track / model
    calm = {path.name: md5(path) for path in folder.iterdir()}
    store = f"stormy-{model}.db"
    checkout.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}"
    injected = wrong = again = late = 0
    pending = 0  # kills since the stage ended last
    finished: dict[str, int] = {}  # epochs by training, as last seen
    while injected < count or pending:
        start = time.monotonic()
        process = checkout.start("dvc", "repro", "--force", "--single-item", stage)
        disturbed = injected < count and pending < KILLS_PER_TRAINING
        moment = time.monotonic() + (moments.uniform(0, calm_seconds) if disturbed else 600)
        begun = False
        while process.poll() is None and time.monotonic() < moment:
            seen = epochs_done(checkout.folder)
            again += any(number < finished.get(name, 0) for name, number in seen.items())
            finished, begun = seen, begun or bool(seen)
            time.sleep(0.02)
        if process.poll() is None:
            kill(process)
            injected, pending = injected + 1, pending + 1
            late += begun and not epochs_done(checkout.folder)
            continue
        output, _ = process.communicate()
        if not pending:  # or else most kills would come too late where the machine was busy at first
            calm_seconds = min(calm_seconds, time.monotonic() - start)
        same = process.returncode == 0 and {path.name: md5(path) for path in folder.iterdir()} == calm
        if not same:
            print(output)
        wrong += pending * (not same)
        pending = 0
    uri = f"sqlite:///{checkout.folder}/{store}"
    lost = sum(not sound(uri, run, EPOCHS[track]) for run in checkout.mlflow_runs(uri))
    told = f"{again} epochs trained twice" + (f"; {late} kills came after the stage's work" if late else "")
    return Outcome(f"SIGKILL: {stage}", injected, max(injected - wrong - lost - again, 0), lost + again, wrong, told)


def kill_a_worker(folder: Path, driver: int, epochs: int = 2) -> Path:
    """Kill a Ray worker of the study that the process `driver` runs, at its training's workspace, which is returned.

    It is the first that is found at work when some training of the checkout `folder` has finished that many epochs.
    """
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(number >= epochs for number in epochs_done(folder).values()):
            for process in psutil.Process(driver).children(recursive=True):
                if process.name().startswith("ray::") and folder / ".studies" in Path(process.cwd()).parents:
                    workspace = Path(process.cwd())
                    process.kill()
                    return workspace
        time.sleep(0.02)
    raise TimeoutError("no training to kill")


def epochs_done(folder: Path) -> dict[str, int]:
    """The finished epochs in each progress file."""
    found = {}
    for path in folder.glob(".progress/*.safetensors"):
        try:
            with path.open("rb") as file:
                file.seek(32)  # a digest, then safetensors' format
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            found[path.name] = len(json.loads(header["__metadata__"]["facts"])["history"])
        except FileNotFoundError:
            continue  # just removed
    return found
