"""Trainings killed at random moments: DVC, the stage, a child that trains, or all of them, in turn; and one in DVC's queue.

`dvc repro` of one stage is disturbed up to three times before it may end. A kill counts as survived if no process is left over,
the stage's checkpoints then have the bytes of an undisturbed training, no finished epoch was trained twice, and the store has for
each training one run, finished, with every epoch once. Each time that the stage ends, the trainings are removed from the cache,
and MLflow's experiment is a new one.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from pipeline.training.cache import Record, read_record
from tests.faults.checkout import SMALL, Checkout, Outcome, checksums, copy_checkout

KILLS_PER_TRAINING = 3
EPOCHS = {"baselines": 2, "distillation": 6}
SEEDS = [0, 1]
QUEUE = (1, 2, 3, 4)  # the seeds of four experiments, so that every training is known by its run's name
QUEUED = ("teacher", "student_distilled", "student_alone")
STAGES = {  # and where their checkpoints go
    "train_baselines@simple_cnn": "baselines/simple_cnn",
    "train_baselines@resnet18": "baselines/resnet18",
    "train_teacher": "distillation/teacher",
    "distill_student": "distillation/student_distilled",
    "train_student_alone": "distillation/student_alone",
}


def _stage_of(dvc: psutil.Process) -> psutil.Process:
    return next(child for child in dvc.children(recursive=True) if any(word.startswith("pipeline.") for word in child.cmdline()))


KILLS = (
    lambda dvc: os.killpg(dvc.pid, signal.SIGKILL),
    lambda dvc: next(child for server in _stage_of(dvc).children() for child in server.children()).kill(),
    lambda dvc: _stage_of(dvc).kill(),
    lambda dvc: dvc.terminate(),
    lambda dvc: dvc.kill(),
)


def kills(folder: Path, count: int, stages: Sequence[str] = tuple(STAGES)) -> list[Outcome]:
    """Kill the stages, `count` times in all, as many stages at a time as there are cores; one outcome per stage."""
    shares = [count // len(stages) + (number < count % len(stages)) for number in range(len(stages))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_kill, [folder] * len(stages), stages, shares))


def _kill(folder: Path, stage: str, count: int) -> Outcome:
    (track, model), moments = STAGES[stage].split("/"), random.Random(stage)
    checkout = copy_checkout(folder / stage, **SMALL, **{f"{track}__epochs": EPOCHS[track]}, seeds=SEEDS)
    checkpoints = checkout.folder / "models" / track / model
    checkout.dvc("repro", stage)
    expected, seconds = checksums(checkpoints), math.inf
    injected = wrong = repeated = rounds = 0
    while injected < count:
        shutil.rmtree(checkout.folder / ".trainings")
        checkout.set(tracking__experiment=f"round {rounds}")
        start, killed, wanted = time.monotonic(), 0, min(KILLS_PER_TRAINING, count - injected) if rounds else 0
        while True:
            process = checkout.start("dvc", "repro", "--force", "--single-item", stage)
            until = time.monotonic() + (moments.uniform(0, seconds) if killed < wanted else 600)
            before = epochs_done(checkout.folder)
            while process.poll() is None and time.monotonic() < until:
                done = epochs_done(checkout.folder)
                repeated += any(done.get(key, 0) < number for key, number in before.items())
                before = done
                time.sleep(0.02)
            if process.poll() is not None:
                break
            wrong += _kill_one(process.pid, injected + killed)
            process.communicate()
            killed += 1
        output, _ = process.communicate()
        if not killed:  # the first time, and if the machine was busy then
            seconds = min(seconds, time.monotonic() - start)
        if process.returncode or checksums(checkpoints) != expected:
            print(output)
            wrong += max(killed, 1)
        injected, rounds = injected + killed, rounds + 1
    names = [f"{model}/seed{seed}" for seed in SEEDS for _ in range(rounds + 1)]
    lost = repeated + checkout.unsound_runs(names, EPOCHS[track])
    return Outcome(f"SIGKILL: {stage}", injected, max(injected - wrong - lost, 0), lost, wrong)


def _kill_one(pid: int, number: int) -> bool:
    """Kill one of the processes, or all; whether any of them is left over."""
    dvc = psutil.Process(pid)
    family = [dvc, *dvc.children(recursive=True)]
    try:
        KILLS[number % len(KILLS)](dvc)
    except (StopIteration, psutil.Error):  # not there yet, or no more
        KILLS[0](dvc)
    return bool(psutil.wait_procs(family, timeout=60)[1])


def records(folder: Path) -> list[Record]:
    """The records of a checkout's trainings."""
    paths = (folder / ".trainings").glob("*/record.json")
    return [record for path in paths if (record := read_record(path.parents[1], path.parent.name))]


def epochs_done(folder: Path) -> dict[str, int]:
    """The finished epochs of each training of a checkout, by its key."""
    return {record.digest: len(record.history) for record in records(folder)}


def queued(folder: Path) -> Outcome:
    """Queue an experiment for each seed, kill the teacher's training in one of them, queue that again.

    DVC deletes the temporary copy of an experiment that failed; queued once more, it must resume after its last finished epoch.
    The tracking store is not there yet when the experiments start.
    """
    checkout = copy_checkout(folder, **SMALL, distillation__epochs=EPOCHS["distillation"])
    _queue(checkout, *QUEUE)
    killed = _kill_a_teacher(checkout)
    first = _until_idle(checkout)
    checkout.dvc("queue", "remove", f"seed{killed.seed}")
    _queue(checkout, killed.seed)
    again = _until_idle(checkout)[f"seed{killed.seed}"]
    failed = sum(first.get(f"seed{seed}") != "Success" for seed in QUEUE if seed != killed.seed)
    lost = failed + (again != "Success" or _teachers(checkout)[killed.seed].started != killed.started)
    wrong = checkout.unsound_runs([f"{model}/seed{seed}" for model in QUEUED for seed in QUEUE], EPOCHS["distillation"])
    if lost or wrong:
        print(first, again, [(run.info.run_name, run.info.status) for run in checkout.mlflow_runs()])
    details = f"{len(QUEUE) - 1 - failed} of the other 3 unharmed; the killed one resumed after epoch {len(killed.history)}"
    return Outcome("queue -j 4, one killed", 1, int(not lost and not wrong), lost, wrong, details)


def _queue(checkout: Checkout, *seeds: int) -> None:
    for seed in seeds:
        checkout.dvc("exp", "run", "--queue", "--name", f"seed{seed}", "-S", f"seeds=[{seed}]", "evaluate@distillation")
    # The workers outlive the command, and a pipe of ours to write to would not outlive it with them.
    command = ["dvc", "queue", "start", "-j", str(len(seeds))]
    subprocess.run(command, **checkout.options, stdout=subprocess.DEVNULL, check=True)


def _teachers(checkout: Checkout) -> dict[int, Record]:
    return {record.seed: record for record in records(checkout.folder) if record.model == "teacher"}


def _kill_a_teacher(checkout: Checkout) -> Record:
    """Kill the first teacher's stage of which two epochs are finished; the record of its training."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
            command, folder = process.info["cmdline"] or [], process.info["cwd"] or ""
            if "pipeline.train_teacher" in command and str(checkout.folder) in folder:
                seed = int(process.info["environ"]["DVC_EXP_NAME"].removeprefix("seed"))
                record = _teachers(checkout).get(seed)
                if record and 2 <= len(record.history) < record.epochs:
                    process.kill()
                    process.wait()
                    return _teachers(checkout)[seed]
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
