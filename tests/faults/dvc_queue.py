"""Four experiments at once in DVC's queue, into a tracking store that is not there yet, and one training killed.

DVC deletes the temporary copy of the experiment that failed; queued once more, it must go on from its last finished epoch.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

from faults.checkout import SMALL, Checkout, copy_checkout
from faults.kills import epochs_done
from faults.outcome import Outcome

SEEDS = (1, 2, 3, 4)  # an experiment each, so that every training is told by its run's name
EPOCHS = 6
MODELS = ("teacher", "student_distilled", "student_alone")


def queued(folder: Path, epochs: int = EPOCHS, **parameters: object) -> Outcome:
    """Queue the experiments, kill the training of one, queue it again."""
    checkout = copy_checkout(folder, **(SMALL | parameters), distillation__epochs=epochs)
    for seed in SEEDS:
        _queue(checkout, seed)
    checkout.environment["OMP_NUM_THREADS"] = "1"
    _work(checkout, len(SEEDS))
    name = _kill_one(checkout)
    status = _until_idle(checkout)
    unharmed = sum(status.get(f"seed{seed}") == "Success" for seed in SEEDS)
    before = max(epochs_done(checkout.folder).values(), default=0)
    seed = int(name.removeprefix("seed"))
    checkout.dvc("queue", "remove", name)
    _queue(checkout, seed)
    _work(checkout, 1)
    resumed = _until_idle(checkout).get(name) == "Success"
    runs = checkout.mlflow_runs()
    expected = Counter(f"{model}/seed{seed}" for model in MODELS for seed in SEEDS)
    found = Counter(run.info.run_name for run in runs if "summary" not in run.info.run_name)
    sound = found == expected and all(run.info.status == "FINISHED" for run in runs)
    if unharmed < len(SEEDS) - 1 or not resumed or not sound:
        print(status, found, [run.info.status for run in runs])
    lost = (len(SEEDS) - 1 - unharmed) + (not resumed)
    told = f"{unharmed} of the other 3 unharmed; the killed one went on after epoch {before}"
    return Outcome("queue -j 4, one killed", 1, int(not lost and sound), lost, int(not sound), told)


def _queue(checkout: Checkout, seed: int) -> None:
    settings = ["-S", f"seeds=[{seed}]", "evaluate@distillation"]
    checkout.dvc("exp", "run", "--queue", "--name", f"seed{seed}", *settings)


def _work(checkout: Checkout, workers: int) -> None:
    """Start workers. They outlive the command, and a pipe of ours to write to would not outlive it with them."""
    command = ["dvc", "queue", "start", "-j", str(workers)]
    subprocess.run(command, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL, check=True)


def _kill_one(checkout: Checkout) -> str:
    """Kill the first training that has finished two epochs; the name of its experiment."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(number >= 2 for number in epochs_done(checkout.folder).values()):
            for process in psutil.process_iter(["cmdline"]):
                command = process.info["cmdline"] or []
                if "pipeline.train_teacher" in command and str(checkout.folder) in process.cwd():
                    name = process.environ()["DVC_EXP_NAME"]
                    os.kill(process.pid, signal.SIGKILL)
                    return name
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
    raise TimeoutError(json.dumps(states))
