"""A fast cut of `make faults`."""

import json
from pathlib import Path

import pytest

from tests.faults.__main__ import RESULTS, tables
from tests.faults.checkout import Outcome
from tests.faults.full_disk import full_disk
from tests.faults.kills import kills
from tests.faults.outages import outages

pytestmark = pytest.mark.faults


def all_survive(outcomes: list[Outcome], injected: int) -> None:
    assert sum(outcome.survived for outcome in outcomes) == sum(outcome.injected for outcome in outcomes) == injected, outcomes


def test_the_committed_page_is_of_the_committed_outcomes():
    page = RESULTS.with_suffix(".md").read_text()
    assert [table in page for table in tables(json.loads(RESULTS.read_text()))] == [True] * 3


def test_killed_trainings_end_with_the_same_bytes_in_the_same_runs(tmp_path: Path):
    all_survive(kills(tmp_path / "checkout", 5, ["train_teacher"]), 5)  # each kind once


def test_an_outage_of_the_tracking_server_does_not_stop_the_training(tmp_path: Path):
    all_survive(outages(tmp_path / "checkout", 3), 3)


def test_a_full_disk_spoils_nothing(tmp_path: Path):
    outcome = full_disk(tmp_path / "disk", ("train_teacher", "evaluate@distillation"))
    if not outcome.injected:
        pytest.skip(outcome.details)
    all_survive([outcome], 4)
