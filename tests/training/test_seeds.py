"""Trainings side by side: each in a process of its own or, as on a GPU, in threads of one."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.training import seeds
from pipeline.training.cache import Record, working_place
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds
from tests.checkout import wait_until
from tests.training.conftest import SETTINGS

LONG = SETTINGS | {"epochs": 300}


@pytest.fixture
def recipes(teacher: Recipe) -> list[Recipe]:
    return [dataclasses.replace(teacher, seed=seed) for seed in range(3)]


def kill_children():
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


@pytest.fixture(autouse=True)
def no_child_left():
    """A training that a test leaves would go on beside the next test, and be the one that it kills."""
    yield
    kill_children()


def checkpoints(folder: Path) -> dict[str, str]:
    return {path.name: md5(path) for path in folder.iterdir()}


def test_the_number_of_jobs_changes_no_byte_and_an_added_seed_trains_alone(recipes: list[Recipe], tmp_path: Path, capfd):
    folder = tmp_path / "models"
    assert len({record.seed for record in train_seeds(recipes[:2], tmp_path / "a", 1, folder)}) == 2
    before = checkpoints(folder)
    assert set(before) == {"seed0.safetensors", "seed1.safetensors"}
    records = list(train_seeds(recipes, tmp_path / "a", "auto", folder))
    assert sum(not record.finished for record in records) == 3, "of the added seed alone: at its start, two epochs"
    assert capfd.readouterr().out.count("taken from .trainings/") == 2
    assert checkpoints(folder).items() >= before.items()
    list(train_seeds(recipes[:1], tmp_path / "b", 3, folder))
    assert checkpoints(folder) == {"seed0.safetensors": before["seed0.safetensors"]}


@pytest.mark.parametrize(("count", "started"), [(2, [2, 2]), (3, [3, 3, 3]), (4, [2, 4, 4, 4]), (5, [2, 3, 5, 5, 5])])
def test_no_core_is_idle_while_the_last_seed_trains(
    teacher: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, started: list[int]
):
    """`started`: how many trainings have been, on two cores, before each one's end is answered."""
    start, starts, seen = seeds._start, [], []

    def noted(*arguments: object) -> object:
        starts.append(child := start(*arguments))
        join = child.process.join
        child.process.join = lambda: (seen.append(len(starts)), join())
        return child

    monkeypatch.setattr(seeds, "_start", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    recipes = [dataclasses.replace(teacher, seed=seed) for seed in range(count)]
    list(train_seeds(recipes, tmp_path / "root", "auto", tmp_path / "models"))
    assert seen == started
    assert len(checkpoints(tmp_path / "models")) == count


@pytest.mark.parametrize(("gpus", "jobs"), [(1, "auto"), (1, 1), (2, "auto"), (2, 3), (4, 2)])
def test_trainings_that_share_a_process_have_the_bytes_of_those_that_do_not(
    recipes: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, jobs: int | str
):
    list(train_seeds(recipes, tmp_path / "a", 1, tmp_path / "apart"))
    monkeypatch.setattr(seeds, "gpu_count", lambda _: gpus)
    records = list(train_seeds(recipes, tmp_path / "b", jobs, tmp_path / "together"))
    assert checkpoints(tmp_path / "together") == checkpoints(tmp_path / "apart")
    assert [sum(record.seed == recipe.seed for record in records) for recipe in recipes] == [4] * 3, "start, two epochs, end"


def test_a_training_waits_while_those_of_other_stages_have_the_cores(teacher: Recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with ThreadPoolExecutor() as pool:
        with working_place(tmp_path / "root", 1):
            stage = pool.submit(lambda: [*train_seeds([teacher], tmp_path / "root", "auto", tmp_path / "models")])
            wait_until(lambda: len([*(tmp_path / "root").glob("*.lock")]) > 1, 60)  # the training's own, after the imports
            with pytest.raises(TimeoutError):
                stage.result(1)
        assert stage.result(60)[-1].finished


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_failing_seed_is_named_and_the_others_are_kept(
    recipes: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
):
    monkeypatch.setattr(seeds, "gpu_count", lambda _: gpus)
    folder, root = tmp_path / "models", tmp_path / "root"
    wild = dataclasses.replace(recipes[1], settings=SETTINGS | {"lr": 1e30})
    broken, records = dataclasses.replace(recipes[2], arguments={"no": 1}), []
    with pytest.raises(UserError, match=r"(?=.*teacher/seed1: the loss.* not finite)(?=.*teacher/seed2: architecture)"):
        records.extend(train_seeds([recipes[0], wild, broken], root, 2, folder))
    assert {record.seed for record in records if "not finite" in (record.failed or "")} == {1}
    assert not folder.exists()
    (record,) = train_seeds(recipes[:1], root, 2, folder)
    assert record.finished, "taken from the cache"
    assert set(checkpoints(folder)) == {"seed0.safetensors"}


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_killed_child_is_told_and_its_trainings_resume(
    recipes: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
):
    monkeypatch.setattr(seeds, "gpu_count", lambda _: gpus)
    long = [dataclasses.replace(recipe, settings=LONG) for recipe in recipes[:2]]
    records: list[Record] = []
    with pytest.raises(UserError, match="teacher/seed0, teacher/seed1: was killed by SIGKILL: the same command resumes it"):  # noqa: PT012
        for record in train_seeds(long, tmp_path / "root", 2, tmp_path / "models"):
            records.append(record)
            if record.seed == 0 and len(record.history) == 3 and not record.failed:
                kill_children()
    assert "SIGKILL" in records[-1].failed
    first = next(train_seeds(long[:1], tmp_path / "root", 1, tmp_path / "models"))
    assert len(first.history) >= 3
    assert first.failed is None


STAGE = """
import sys
from pathlib import Path
from pipeline.core.cli import run
from pipeline.training import seeds
from pipeline.training.recipe import Recipe
from pipeline.training.seeds import train_seeds

def main():
    folder = Path({folder!r})
    recipe = Recipe("teacher", "compact_cnn", {{"width": 4, "hidden": 8}}, {settings!r}, 0, folder / "data", "cpu")
    for record in train_seeds([recipe], folder / "root", 1, folder / "models"):
        if len(record.history) == 2:
            (folder / "begun").touch()

if __name__ == "__main__":
    run(main)
"""


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, "starter"))]
)
def test_no_process_outlives_the_one_that_started_it(recipes: list[Recipe], tmp_path: Path, how):
    (tmp_path / "stage.py").write_text(STAGE.format(folder=str(tmp_path), settings=LONG | {"epochs": 3000}))
    command = [sys.executable, str(tmp_path / "stage.py")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    if how == "starter":  # as DVC, killed
        command = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"]
        environment |= {"DVC_STAGE": "train_teacher"}
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(started.pid).children(recursive=True)
    assert len(family) >= 2
    started.send_signal(signal.SIGKILL if how == "starter" else how)
    assert gone(family)
    if how == signal.SIGINT:
        assert started.wait(10) == 130
        assert "interrupted: the same command resumes" in started.stderr.read()
