"""One process of a training stage is killed: the same command then ends with the same bytes, and one run each."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from pipeline.core.files import md5
from tests.conftest import small_checkout
from tests.faults.checkout import Checkout, complete
from tests.faults.kills import epochs_done

EPOCHS = 60
STAGE = "train_teacher"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of an undisturbed training's checkpoints."""
    return train(small_checkout(tmp_path_factory.mktemp("calm") / "checkout", distillation__epochs=EPOCHS))


def train(checkout: Checkout) -> dict[str, str]:
    checkout.dvc("repro", STAGE)
    return {path.name: md5(path) for path in (checkout.folder / "models/distillation/teacher").iterdir()}


def stage_of(dvc: psutil.Process) -> psutil.Process:
    return next(process for process in dvc.children(recursive=True) if f"pipeline.{STAGE}" in process.cmdline())


def child_of(dvc: psutil.Process) -> psutil.Process:
    """A training's process: the fork server's child."""
    return next(child for server in stage_of(dvc).children() for child in server.children())


KILLS = {
    "dvc, by TERM": lambda dvc: dvc.terminate(),
    "dvc, by KILL": lambda dvc: dvc.kill(),
    "the stage": lambda dvc: stage_of(dvc).kill(),
    "a child": lambda dvc: child_of(dvc).kill(),
    "the whole group": lambda dvc: os.killpg(dvc.pid, signal.SIGKILL),
}


@pytest.mark.parametrize("who", KILLS)
def test_the_same_command_ends_with_the_same_bytes_and_one_run_each(calm: dict[str, str], tmp_path: Path, who: str):
    checkout = small_checkout(tmp_path / "checkout", distillation__epochs=EPOCHS)
    started = checkout.start("dvc", "repro", STAGE)
    deadline = time.monotonic() + 120
    while min(epochs_done(checkout.folder).values(), default=0) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dvc = psutil.Process(started.pid)
    family = [dvc, *dvc.children(recursive=True)]
    KILLS[who](dvc)
    output, _ = started.communicate(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    if who == "a child":
        assert "was killed by SIGKILL: the same command resumes it" in output
    done = epochs_done(checkout.folder)
    assert min(done.values()) >= 3
    assert train(checkout) == calm
    runs = [run for run in checkout.mlflow_runs() if "/seed" in run.info.run_name]
    assert sorted(run.info.run_name for run in runs) == ["teacher/seed0", "teacher/seed1"]
    assert all(complete(f"sqlite:///{checkout.folder}/mlflow.db", run, EPOCHS) for run in runs)
