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
from tests.faults.conftest import FULL

pytestmark = pytest.mark.faults
STAGES = {  # and where their checkpoints go
    "train_student_alone": "distillation/student_alone",
    "train_baselines simple_cnn": "baselines/simple_cnn",
    "distill_student distillation": "distillation/student_distilled",
}
STEP = 1 if FULL else 7  # of the places where a stage may be killed, all or every seventh
QUEUE = (1, 2, 3, 4)  # the seeds of four experiments, so that every training is known by its run's name
EPOCHS = 6


def _stage_of(dvc: psutil.Process) -> psutil.Process:
    return next(child for child in dvc.children(recursive=True) if any(word.startswith("pipeline.") for word in child.cmdline()))


KILLS = {
    "the group": lambda dvc: os.killpg(dvc.pid, signal.SIGKILL),
    "a child": lambda dvc: next(child for server in _stage_of(dvc).children() for child in server.children()).kill(),
    "the stage": lambda dvc: _stage_of(dvc).kill(),
    "dvc, by TERM": lambda dvc: dvc.terminate(),
    "dvc, by KILL": lambda dvc: dvc.kill(),
}


@pytest.mark.parametrize("stage", STAGES if FULL else list(STAGES)[:1])
def test_a_stage_may_be_killed_wherever_it_replaces_a_file_or_commits(tmp_path: Path, outcome, stage: str):
    checkout = copy_checkout(tmp_path / "checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0])
    checkout.dvc("repro", stage.replace(" ", "@"))
    models = checkout.folder / "models" / STAGES[stage]
    expected, counter, outcome.fault = checksums(models), tmp_path / "places", f"SIGKILL where it writes: {stage}"
    killed = Checkout(checkout.folder)
    killed.environment |= {"PYTHONPATH": f"{Path(__file__).parent / 'killer'}:{checkout.folder}", "KILL_COUNTER": str(counter)}
    place, status = 1, -1
    while status:  # until there is no such place
        shutil.rmtree(checkout.folder / ".trainings")
        checkout.set(tracking__experiment=f"place {place}")
        counter.unlink(missing_ok=True)
        killed.environment["KILL_AT"] = str(place)
        process = killed.start(*checkout.stage(stage))
        output, _ = process.communicate(timeout=300)
        if status := process.returncode:
            _, left = psutil.wait_procs([other for other in psutil.process_iter() if _group_of(other) == process.pid], 60)
            again = checkout.run(*checkout.stage(stage), expect=None)
            outcome.injected += 1
            if left or again.returncode or checksums(models) != expected:
                print(f"place {place}: {left}{output}{again.stdout}{again.stderr}")
                outcome.wrong += 1
        place += STEP
    rounds = outcome.injected + 2  # the first, and the last, undisturbed
    outcome.lost = checkout.unsound_runs([f"{models.name}/seed0"] * rounds, 1)
    assert outcome.injected > 15 / STEP, "there are that many places"


def _group_of(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return 0


@pytest.mark.parametrize("who", KILLS)
def test_dvc_resumes_whoever_is_killed(tmp_path: Path, outcome, who: str):
    checkout = copy_checkout(tmp_path, **SMALL, distillation__epochs=EPOCHS, seeds=[0, 1])
    models, outcome.fault = checkout.folder / "models/distillation/student_alone", f"SIGKILL under dvc repro: {who}"
    stage = "dvc", "repro", "--force", "--single-item", "train_student_alone"
    checkout.dvc("repro", "train_student_alone")
    expected, before = checksums(models), {}
    shutil.rmtree(checkout.folder / ".trainings")
    checkout.set(tracking__experiment="killed")
    process = checkout.start(*stage)
    while max([0, *before.values()]) < 2:
        assert process.poll() is None, process.communicate()
        before = _epochs(checkout)
        time.sleep(0.02)
    dvc = psutil.Process(process.pid)
    family = [dvc, *dvc.children(recursive=True)]
    KILLS[who](dvc)
    outcome.injected, outcome.wrong = 1, len(psutil.wait_procs(family, timeout=60)[1])
    before = _epochs(checkout)
    again, repeated = checkout.start(*stage), False
    while again.poll() is None:
        repeated |= any(_epochs(checkout).get(key, 0) < number for key, number in before.items())
        time.sleep(0.02)
    outcome.wrong = min(1, outcome.wrong + bool(again.returncode) + (checksums(models) != expected))
    outcome.lost = int(repeated or checkout.unsound_runs([f"student_alone/seed{seed}" for seed in (0, 1)] * 2, EPOCHS) > 0)


def _records(checkout: Checkout) -> list[Record]:
    paths = (checkout.folder / ".trainings").glob("*/record.json")
    return [record for path in paths if (record := read_record(path.parents[1], path.parent.name))]


def _epochs(checkout: Checkout) -> dict[str, int]:
    return {record.digest: len(record.history) for record in _records(checkout)}


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
    (resumed,) = (record for record in _teachers(checkout) if record.seed == killed.seed)
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


def _teachers(checkout: Checkout) -> list[Record]:
    return [record for record in _records(checkout) if record.model == "teacher"]


def _kill_a_teacher(checkout: Checkout) -> Record | None:
    """Kill the stage of a teacher of which two epochs or more are finished; the record of its training."""
    begun = [record for record in _teachers(checkout) if 2 <= len(record.history) < record.epochs]
    for process in psutil.process_iter(["cmdline", "environ"]) if begun else ():
        experiment = {"DVC_ROOT": str(checkout.folder), "DVC_EXP_NAME": f"seed{begun[0].seed}"}
        environment = process.info["environ"] or {}
        if "pipeline.train_teacher" in (process.info["cmdline"] or []) and experiment.items() <= environment.items():
            process.kill()
            process.wait()
            return next(record for record in _teachers(checkout) if record.seed == begun[0].seed)
    return None
