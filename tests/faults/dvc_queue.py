"""Four experiments at once in DVC's queue, into a tracking store that is not there yet, and one training killed.

DVC deletes the temporary copy of the experiment that failed; queued once more, it must resume after its last finished epoch.
"""

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

from pipeline.training.cache import Record
from tests.faults.checkout import SMALL, Checkout, Outcome, complete, copy_checkout
from tests.faults.kills import records

SEEDS = (1, 2, 3, 4)  # an experiment each, so that every training is known by its run's name
MODELS = ("teacher", "student_distilled", "student_alone")


def queued(folder: Path, epochs: int = 6, **parameters: object) -> Outcome:
    """Queue the experiments, kill the training of one, queue it again."""
    checkout = copy_checkout(folder, **(SMALL | parameters), distillation__epochs=epochs)
    for seed in SEEDS:
        _queue(checkout, seed)
    _work(checkout, len(SEEDS))
    killed = _kill_one(checkout)
    states = _until_idle(checkout)
    unharmed = sum(states.get(f"seed{seed}") == "Success" for seed in SEEDS)
    checkout.dvc("queue", "remove", f"seed{killed.seed}")
    _queue(checkout, killed.seed)
    _work(checkout, 1)
    again = _until_idle(checkout).get(f"seed{killed.seed}")
    resumed = again == "Success" and _teacher(checkout, killed.seed).started == killed.started
    uri = f"sqlite:///{checkout.folder}/mlflow.db"
    runs = [run for run in checkout.mlflow_runs() if "/seed" in run.info.run_name]
    names = Counter(run.info.run_name for run in runs)
    sound = names == Counter(f"{model}/seed{seed}" for model in MODELS for seed in SEEDS)
    sound = sound and all(complete(uri, run, epochs) for run in runs)
    lost = (len(SEEDS) - 1 - unharmed) + (not resumed)
    if lost or not sound:
        print(states, again, names, [run.info.status for run in runs])
    details = f"{unharmed} of the other 3 unharmed; the killed one resumed after epoch {len(killed.history)}"
    return Outcome("queue -j 4, one killed", 1, int(not lost and sound), lost, int(not sound), details)


def _queue(checkout: Checkout, seed: int) -> None:
    settings = ["-S", f"seeds=[{seed}]", "evaluate@distillation"]
    checkout.dvc("exp", "run", "--queue", "--name", f"seed{seed}", *settings)


def _work(checkout: Checkout, workers: int) -> None:
    """Start workers. They outlive the command, and a pipe of ours to write to would not outlive it with them."""
    command = ["dvc", "queue", "start", "-j", str(workers)]
    subprocess.run(command, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL, check=True)


def _teacher(checkout: Checkout, seed: int) -> Record | None:
    teachers = (record for record in records(checkout.folder) if (record.model, record.seed) == ("teacher", seed))
    return next(teachers, None)


def _kill_one(checkout: Checkout) -> Record:
    """Kill the first teacher's stage of which two epochs are finished; the record of its training."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
            command, folder = process.info["cmdline"] or [], process.info["cwd"] or ""
            if "pipeline.train_teacher" in command and str(checkout.folder) in folder:
                seed = int(process.info["environ"]["DVC_EXP_NAME"].removeprefix("seed"))
                record = _teacher(checkout, seed)
                if record and 2 <= len(record.history) < record.epochs:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    return _teacher(checkout, seed)
        time.sleep(0.05)
    raise TimeoutError("no training to kill")


def _until_idle(checkout: Checkout) -> dict[str, str]:
    """Wait until the queue has nothing to do; the state of each experiment by name."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        lines = [line.split() for line in checkout.dvc("queue", "status").splitlines()]
        states = {line[1]: line[-1] for line in lines if len(line) > 2 and line[1].startswith("seed")}
        if states and not set(states.values()) & {"Queued", "Running"}:
            return states
        time.sleep(1)
    raise TimeoutError(states)
