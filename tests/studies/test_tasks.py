"""How a study's points become tasks, and what fails. Nothing here trains; test_runs.py does."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.params import Params, load_params
from studies import tasks
from studies.study import load_study, merge
from studies.tasks import ROOT, Task, one_by_one, plan

EVALUATION = {"evaluate"}
DISTILLED = {"student_distilled/seed0", *EVALUATION}
STUDENTS = {"student_alone/seed0", *DISTILLED}
TRAININGS = {"teacher/seed0", *STUDENTS}
ALL = {"prepare_data", *TRAININGS}


def tasks_with(**settings: Any) -> list[Task]:
    """The tasks of params.yaml with one seed and an own file; a block's key is written with two underscores."""
    changes = {"seeds": [0], "distillation.dataset": "own/images.npz"} | {
        key.replace("__", "."): settings[key] for key in settings
    }
    return plan(Params.model_validate(merge(load_params(ROOT / "params.yaml").model_dump(), changes)))


def changed(before: list[Task], after: list[Task]) -> set[str]:
    """The titles of tasks that were not there before."""
    return {task.title for task in after if task.digest not in {task.digest for task in before}}


def test_points_share_what_their_settings_do_not_touch():
    needed = {task.digest: task for point in load_study("mnist")[1] for task in plan(point.params)}
    assert Counter(task.title.partition("/")[0] for task in needed.values()) == {
        "prepare_data": 1,
        "teacher": 3 * 5,  # shares of the labels, seeds
        "student_alone": 3 * 3 * 5,  # and sizes
        "student_distilled": 25 * 5,
        "evaluate": 25,
    }


@pytest.mark.parametrize(
    ("settings", "package", "titles"),
    [
        ({"baselines__lr": 0.1, "jobs": 2}, "", set()),
        ({"evaluation__primary": "auc", "evaluation__margin": 0.01}, "", set()),
        ({"kd__alpha": 0.1}, "", DISTILLED),
        ({"student__width": 4}, "", STUDENTS),
        ({"teacher__width": 4}, "", TRAININGS - {"student_alone/seed0"}),
        ({"seeds": [0, 1]}, "", EVALUATION | {title.replace("0", "1") for title in TRAININGS}),
        ({"threads": 2}, "", TRAININGS),
        ({"distillation__validation": 0.2}, "", ALL),
        ({}, "reporting", set()),
        ({}, "evaluation", EVALUATION),
        ({}, "training", TRAININGS),
        ({}, "fetching", ALL),
        ({}, "data", ALL),
    ],
)
def test_a_digest_changes_with_parameters_and_code(monkeypatch: pytest.MonkeyPatch, settings: dict, package: str, titles: set):
    before, code = tasks_with(), tasks._code
    monkeypatch.setattr(tasks, "_code", lambda packages: code(packages) + "changed" * (package in packages))
    assert changed(before, tasks_with(**settings)) == titles


def test_a_study_has_no_teacher_from_outside():
    with pytest.raises(UserError, match="a study trains its teachers"):
        tasks_with(teacher__logits="a.npz")


def test_a_digest_changes_with_the_images(no_mirror: Path):
    (no_mirror / "own").mkdir()
    (no_mirror / "own/images.npz").write_bytes(b"images")
    before = tasks_with()
    (no_mirror / "own/images.npz").write_bytes(b"others")
    tasks._md5.cache_clear()
    assert changed(before, tasks_with()) == ALL


def test_what_fails_takes_along_what_needs_it_and_nothing_else():
    def work(digest: str, *results: str) -> str:
        if digest == "bad":
            raise UserError("not\nthere")
        if digest == "worse":
            raise KeyError("defect")
        return "+".join((*results, digest))

    needs = {"bad": (), "worse": (), "good": (), "after_bad": ("good", "bad"), "last": ("after_bad",), "after_good": ("good",)}
    order = [Task(name, name, work, (), needed) for name, needed in needs.items()]
    outcomes = {task.digest: outcome for task, outcome in one_by_one(order)}
    assert outcomes["after_good"] == ("good+after_good", None)
    assert outcomes["bad"] == outcomes["after_bad"] == outcomes["last"] == (None, "bad: not there")
    assert outcomes["worse"] == (None, "worse: KeyError: 'defect'")
