"""How many faults there are, and what came of them: a table, which `make faults` writes to results.md.

With the variable FAULTS set there are all of them, else a fast cut.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from pipeline.core.files import write_atomic
from pipeline.core.provenance import code_is_committed, commit, machine

FULL = "FAULTS" in os.environ
RESULTS = Path(__file__).with_name("results.md")
EXPLANATION = """Written by `make faults`: each kind of fault, each fault, and where. Survived means: nothing missing (lost) and
nothing other than without the fault (wrong); what exactly, each test says."""
REPORTS: list[pytest.TestReport] = []  # of all workers


@dataclass
class Outcome:
    """What came of a fault; of several, the part of its name before the colon is the kind."""

    fault: str = ""
    injected: int = 0
    lost: int = 0  # of them: something was missing afterwards
    wrong: int = 0  # of them: something was other than without the fault
    details: str = ""


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Iterator[Outcome]:
    """A row of the table. The test fails unless every fault was survived."""
    row = Outcome()
    yield row
    record_property("outcome", vars(row))
    assert row.lost == row.wrong == 0, row


def tables(outcomes: list[dict]) -> list[str]:
    """A row for each kind of fault, its numbers summed up; a row for each fault."""
    frame = pd.DataFrame(outcomes).sort_values("fault").rename(columns={"details": ""})
    frame.insert(2, "survived", (frame["injected"] - frame["lost"] - frame["wrong"]).clip(0))
    kinds = frame.drop(columns="fault").groupby(frame["fault"].str.partition(":")[0].rename("fault")).sum().reset_index()
    return [rows.to_markdown(index=False, tablefmt="github") for rows in (kinds, frame)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what the tests and, with xdist, its workers report."""
    REPORTS.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page."""
    outcomes = [value for report in REPORTS if report.when == "teardown" for _, value in report.user_properties]
    if FULL and outcomes and not hasattr(session.config, "workerinput"):
        code = commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")
        minutes = sum(report.duration for report in REPORTS) / 60
        where = {"commit": code, "minutes, of all tests together": f"{minutes:.1f}"} | machine()
        place = pd.DataFrame([where]).to_markdown(index=False, tablefmt="github", disable_numparse=True)
        write_atomic(RESULTS, "\n\n".join(["# Faults", EXPLANATION, *tables(outcomes), place]) + "\n")
