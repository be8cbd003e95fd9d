"""How a study's points become tasks, and how one task is done. Nothing here trains; tests/test_study_runs.py does."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from faults.checkout import ROOT, Checkout
from pipeline.core.errors import UserError
from studies import engines, tasks
from studies.engines import one_by_one
from studies.study import all_points, applied, contents, load_study
from studies.tasks import Stage, Task, attempt, in_order, is_done, plan, workspace
from tests.conftest import small_checkout

TARGET = "evaluate@distillation"
EVALUATION = {TARGET}
DISTILLED = {"distill_student", *EVALUATION}
STUDENTS = {"train_student_alone", *DISTILLED}
TRAININGS = {"train_teacher", *STUDENTS}
ALL = {"fetch_data@distillation", *TRAININGS}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A copy of the project whose distillation track reads a file of one's own, two seeds."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "checkout"))
    return small_checkout(tmp_path / "checkout")


def planned(checkout: Checkout, settings: Mapping[str, Any] | None = None, threads: int = 1) -> list[Task]:
    content = applied(yaml.safe_load((checkout.folder / "params.yaml").read_text()), settings or {})
    return in_order(plan(checkout.folder, {"point": content}, TARGET, threads)["point"])


def changed(before: list[Task], after: list[Task]) -> set[str]:
    """The stages that have tasks which were not there before."""
    return {task.stage.name for task in after} - {
        task.stage.name for task in after if task.digest in {one.digest for one in before}
    }


def test_points_share_what_their_settings_do_not_touch():
    study = load_study("mnist")
    points = plan(ROOT, contents("mnist", study), study.target, 1)
    assert list(points) == list(all_points("mnist", study))
    found = in_order([task for targets in points.values() for task in targets])
    assert Counter(task.stage.name for task in found) == {
        "fetch_data@distillation": 1,
        "train_teacher": 3 * 5,  # shares of the labels, seeds
        "train_student_alone": 3 * 3 * 5,  # and sizes
        "distill_student": 25 * 5,
        "evaluate@distillation": 25,
    }
    assert len({task.digest for task in found}) == len(found)


def test_a_training_needs_its_own_seed_and_an_evaluation_all(checkout: Checkout):
    found = planned(checkout)
    needs = {str(task): {str(needed) for needed in task.needs} for task in found}
    data = "fetch_data@distillation"
    assert needs == {
        data: set(),
        **{f"train_teacher, seed {seed}": {data} for seed in (0, 1)},
        **{f"train_student_alone, seed {seed}": {data} for seed in (0, 1)},
        **{f"distill_student, seed {seed}": {data, f"train_teacher, seed {seed}"} for seed in (0, 1)},
        TARGET: set(needs) - {TARGET},
    }
    assert [task.params["seeds"] for task in found if task.stage.name == "train_teacher"] == [[0], [1]]
    assert found[-1].params["seeds"] == [0, 1]


def test_tasks_come_after_those_that_they_need(checkout: Checkout):
    seen = set()
    for task in planned(checkout):
        assert {needed.digest for needed in task.needs} <= seen
        seen.add(task.digest)


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({"baselines.lr": 0.1}, set()),
        ({"kd.alpha": 0.1}, DISTILLED),
        ({"student.width": 4}, STUDENTS),
        ({"teacher.width": 4}, TRAININGS - {"train_student_alone"}),
        ({"tracking.experiment": "other"}, TRAININGS),
        ({"distillation.validation": 0.2}, ALL),
        ({"seeds": [0, 1, 2]}, EVALUATION),
    ],
)
def test_a_digest_changes_with_the_parameters_that_the_stage_declares(
    checkout: Checkout, settings: dict[str, Any], stages: set[str]
):
    before, after = planned(checkout), planned(checkout, settings)
    if "seeds" in settings:  # what is there for two seeds serves for three
        after = [task for task in after if task.seed != 2]
    assert changed(before, after) == stages


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        ("report.py", set()),
        ("evaluate.py", EVALUATION),
        ("distillation.py", DISTILLED),
        ("training.py", TRAININGS),
        ("data/sources.py", ALL),
    ],
)
def test_a_digest_changes_with_the_code_that_the_stage_declares(checkout: Checkout, module: str, stages: set[str]):
    before = planned(checkout)
    with (checkout.folder / "pipeline" / module).open("a") as file:
        file.write("# changed\n")
    assert changed(before, planned(checkout)) == stages


def test_a_digest_changes_with_the_images_and_the_threads(checkout: Checkout):
    before = planned(checkout)
    assert changed(before, planned(checkout)) == set()
    assert changed(before, planned(checkout, threads=2)) == ALL
    with (checkout.folder / "own.npz").open("ab") as file:
        file.write(b"more")
    assert changed(before, planned(checkout)) == ALL


def test_a_target_that_is_no_stage_is_told():
    with pytest.raises(UserError, match=r"target = 'evaluat' is no stage of dvc\.yaml; those are: distill_student, "):
        plan(ROOT, {}, "evaluat", 1)


def task_of(name: str, *needs: Task) -> Task:
    stage = Stage(name, f"pipeline.{name}", ("argument",), ("data/own/track",), ("device",), (f"models/{name}",))
    return Task(name, stage, None, {"device": "auto"}, 1, "point", needs)


def replace_main(monkeypatch: pytest.MonkeyPatch, main: Any) -> None:
    monkeypatch.setattr(tasks.importlib, "import_module", lambda name: SimpleNamespace(main=main))


def test_a_task_runs_as_under_dvc_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def main(argument: str) -> None:
        variables = [os.environ[key] for key in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "OMP_NUM_THREADS")]
        seen.append((argument, Path.cwd(), sys.argv[0], torch.get_num_threads(), variables))
        print("said")
        Path("models/first").mkdir(parents=True)
        Path("models/first/file").write_text("made")

    before = (Path.cwd(), sys.argv, torch.get_num_threads(), dict(os.environ))
    replace_main(monkeypatch, main)
    task = task_of("first")
    assert attempt(tmp_path, task, {"DVC_ROOT": "here"}) is None
    assert attempt(tmp_path, task, {"DVC_ROOT": "here"}) is None
    folder = workspace(tmp_path, task)
    assert seen == [("argument", folder, "pipeline/first.py", 1, ["here", "first", "point", "1"])]
    assert (Path.cwd(), sys.argv, torch.get_num_threads(), dict(os.environ)) == before
    assert (folder / "log").read_text() == "said\n"
    assert sorted(path.name for path in tmp_path.glob(".studies/*")) == ["first"]
    replace_main(monkeypatch, lambda argument: seen.append(Path("models/first/file").read_text()))
    assert attempt(tmp_path, task_of("second", task), {}) is None
    assert seen[-1] == "made"


def test_what_fails_takes_along_what_needs_it_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def main(argument: str) -> None:
        if os.environ["DVC_STAGE"] == "bad":
            raise UserError("not\nthere")
        if os.environ["DVC_STAGE"] == "worse":
            raise KeyError("defect")

    replace_main(monkeypatch, main)
    bad, worse, good = (task_of(name) for name in ("bad", "worse", "good"))
    after_bad, after_good = task_of("after_bad", good, bad), task_of("after_good", good)
    ended = {}
    for one in one_by_one(tmp_path, [bad, worse, good, after_bad, task_of("last", after_bad), after_good], {}):
        ended |= one
    assert ended["good"] is ended["after_good"] is None
    assert ended["bad"] == ended["after_bad"] == ended["last"] == "bad: not there"
    assert ended["worse"].startswith("worse: KeyError: 'defect' (see ")
    assert "Traceback" in (workspace(tmp_path, worse) / "traceback").read_text()
    assert not is_done(tmp_path, bad)
    replace_main(monkeypatch, lambda argument: None)
    assert attempt(tmp_path, bad, {}) is None


def test_a_task_takes_a_gpu_only_if_its_stage_would():
    task = task_of("first")
    assert task.uses_gpu()
    assert not Task("", task.stage, None, {"device": "cpu"}, 1, "", ()).uses_gpu()
    assert not Task("", task.stage._replace(params=()), None, {"device": "auto"}, 1, "", ()).uses_gpu()


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"^RAY_ADDRESS=127\.0\.0\.1:9: no answer"):
        next(engines.on_ray(tmp_path, [task_of("first")], {}, 1, 1, 4))
