"""A fast cut of `make faults`."""

import json
from pathlib import Path

import pytest

from faults.__main__ import RESULTS, page
from faults.full_disk import full_disk
from faults.kills import kills
from faults.outages import outages
from faults.outcome import Outcome


def all_survive(outcomes: list[Outcome], injected: int) -> None:
    assert sum(outcome.injected for outcome in outcomes) == injected
    for outcome in outcomes:
        assert outcome.survived == outcome.injected, outcome


def test_the_committed_page_is_of_the_committed_outcomes():
    parts = json.loads(RESULTS.read_text())
    for part in parts.values():
        part["outcomes"] = [Outcome(*row) for row in part["outcomes"]]
    assert RESULTS.with_suffix(".md").read_text() == page(parts)


def test_killed_trainings_end_with_the_same_bytes_in_the_same_runs(tmp_path: Path):
    all_survive(kills(tmp_path / "checkout", 4, ["train_student_alone"]), 4)


def test_an_outage_of_the_tracking_server_costs_nothing(tmp_path: Path):
    all_survive(outages(tmp_path / "checkout", 3), 3)


def test_a_full_disk_spoils_nothing(tmp_path: Path):
    outcome = full_disk(tmp_path / "disk", ("train_teacher", "evaluate@distillation"))
    if not outcome.injected:
        pytest.skip(outcome.told)
    all_survive([outcome], 4)
