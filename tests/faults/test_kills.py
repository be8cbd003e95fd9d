"""Killed processes. Afterwards none is left, the checkpoints have the bytes of an undisturbed training, no finished epoch was
trained twice, and the store has for each training one run, finished, with every epoch once.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.training.cache import Record, read_record
from tests.checkout import SMALL, Checkout, checksums, copy_checkout, wait_until
from tests.faults.conftest import EPOCHS, FULL, SEEDS, STUDENTS

pytestmark = pytest.mark.faults
STAGES = {  # and where their checkpoints go
    "train_student_alone": "distillation/student_alone",
    "train_baselines simple_cnn": "baselines/simple_cnn",
    "distill_student distillation": "distillation/student_distilled",
}
STEP = 1 if FULL else 7  # of the places where a stage may be killed, all or every seventh
QUEUE = (1, 2, 3, 4)  # the seeds of four experiments, so that every training is known by its run's name
KILLS = {
    "the group": lambda dvc: os.killpg(dvc.pid, signal.SIGKILL),
    "a child": lambda dvc: next(child for server in _stage_of(dvc).children() for child in server.children()).kill(),
    "the stage": lambda dvc: _stage_of(dvc).kill(),
    "dvc, by TERM": lambda dvc: dvc.terminate(),
    "dvc, by KILL": lambda dvc: dvc.kill(),
}


def _stage_of(dvc: psutil.Process) -> psutil.Process:
    return next(child for child in dvc.children(recursive=True) if any(word.startswith("pipeline.") for word in child.cmdline()))


@pytest.mark.parametrize("stage", STAGES if FULL else list(STAGES)[:1])
def test_a_stage_may_be_killed_wherever_it_replaces_a_file_or_commits(untrained: Checkout, tmp_path: Path, outcome, stage: str):
    checkout, killed, outcome.fault = untrained, Checkout(untrained.folder), f"SIGKILL where it writes: {stage}"
    checkout.set(baselines__epochs=1, distillation__epochs=1, seeds=[0])
    checkout.dvc("repro", stage.replace(" ", "@"))
    models, counter, place = checkout.folder / "models" / STAGES[stage], tmp_path / "places", 1
    expected, status, path = checksums(models), -1, f"{Path(__file__).parent / 'killer'}:{checkout.folder}"
    while status:  # until there is no such place
        shutil.rmtree(checkout.folder / ".trainings")
        counter.unlink(missing_ok=True)
        checkout.experiment = f"{stage}, place {place}"
        checkout.set(tracking__experiment=checkout.experiment)
        killed.environment |= {"PYTHONPATH": path, "KILL_COUNTER": str(counter), "KILL_AT": str(place)}
        process = killed.start(*checkout.stage(stage))
        output, _ = process.communicate(timeout=300)  # until no process is left to write any
        if status := process.returncode:
            again = checkout.run(*checkout.stage(stage), expect=None)
            outcome.injected += 1
            if again.returncode or checksums(models) != expected:
                print(f"place {place}: {output}{again.stdout}{again.stderr}")
                outcome.wrong += 1
        outcome.lost += checkout.unsound_runs([f"{models.name} epochs=1/seed0"], 1) > 0
        place += STEP
    assert outcome.injected > 15 / STEP, "there are that many places"


@pytest.mark.parametrize("who", KILLS)
def test_dvc_resumes_whoever_is_killed(untrained: Checkout, outcome, who: str):
    checkout, outcome.fault, outcome.injected = untrained, f"SIGKILL under dvc repro: {who}", 1
    stage = "dvc", "repro", "--force", "--single-item", "train_student_alone"
    process = checkout.start(*stage)
    wait_until(lambda: any(len(record.history) >= 2 for record in _records(checkout).values()))
    KILLS[who](psutil.Process(process.pid))
    process.communicate(timeout=60)  # until no process is left to write anything
    before, again, repeated = _records(checkout), checkout.start(*stage), False
    while again.poll() is None:
        now = _records(checkout)
        repeated |= any(digest not in now or len(now[digest].history) < len(old.history) for digest, old in before.items())
        time.sleep(0.02)
    print(f"trained twice: {repeated}", *again.communicate())
    outcome.wrong = int(again.returncode != 0 or checksums(checkout.folder / STUDENTS) != checkout.expected)
    outcome.lost = int(repeated or checkout.unsound_runs([f"student_alone/seed{seed}" for seed in SEEDS], EPOCHS) > 0)


def _records(checkout: Checkout) -> dict[str, Record]:
    paths = (checkout.folder / ".trainings").glob("*/record.json")
    records = {path.parent.name: read_record(path.parents[1], path.parent.name) for path in paths}
    return {digest: record for digest, record in records.items() if record}


@pytest.mark.skipif(not FULL, reason="two minutes: make faults")
def test_an_experiment_that_is_killed_in_the_queue_resumes_when_it_is_queued_again(tmp_path: Path, outcome):
    """DVC deletes the temporary copy of an experiment that failed. The tracking store is not there yet when they start."""
    checkout, outcome.fault = copy_checkout(tmp_path, **SMALL, distillation__epochs=EPOCHS), "queue -j 4, one killed"
    _queue(checkout, *QUEUE)
    killed = wait_until(lambda: _kill_a_teacher(checkout))
    first = checkout.queued()
    checkout.dvc("queue", "remove", f"seed{killed.seed}")
    _queue(checkout, killed.seed)
    states = first | checkout.queued()
    resumed = read_record(checkout.folder / ".trainings", killed.digest)
    outcome.injected, outcome.details = 1, f"the killed one resumed after epoch {len(killed.history)}"
    outcome.lost = int([*states.values()] != ["Success"] * 4 or resumed.started != killed.started)
    models = ("teacher", "student_distilled", "student_alone")
    unsound = checkout.unsound_runs([f"{model}/seed{seed}" for model in models for seed in QUEUE], EPOCHS)
    outcome.wrong = int(not outcome.lost and unsound > 0)
    print(first, states, unsound)


def _queue(checkout: Checkout, *seeds: int) -> None:
    for seed in seeds:
        checkout.dvc("exp", "run", "--queue", "--name", f"seed{seed}", "-S", f"seeds=[{seed}]", "evaluate@distillation")
    # The workers outlive the command, and a pipe of ours to write to would not outlive it with them.
    command = ["dvc", "queue", "start", "-j", str(len(seeds))]
    subprocess.run(command, **checkout.options, stdout=subprocess.DEVNULL, check=True)


def _kill_a_teacher(checkout: Checkout) -> Record | None:
    """Kill the stage of a teacher of which two epochs or more are finished; the record of its training."""
    for record in _records(checkout).values():
        if record.model != "teacher" or not 2 <= len(record.history) < record.epochs:
            continue
        experiment = {"DVC_ROOT": str(checkout.folder), "DVC_EXP_NAME": f"seed{record.seed}"}
        for process in psutil.process_iter(["cmdline", "environ"]):
            of_experiment = experiment.items() <= (process.info["environ"] or {}).items()
            if of_experiment and "pipeline.train_teacher" in (process.info["cmdline"] or []):
                process.kill()
                process.wait()
                return read_record(checkout.folder / ".trainings", record.digest)
    return None
