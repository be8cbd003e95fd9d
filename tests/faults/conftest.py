"""How many faults there are, and what came of them: a table, which `make faults` writes to results.md.

With the variable FAULTS set there are all of them, else a fast cut.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tabulate import tabulate

from pipeline.core.files import write_atomic
from pipeline.core.provenance import code_is_committed, commit, machine

FULL = "FAULTS" in os.environ
RESULTS = Path(__file__).with_name("results.md")
HEADERS = ("fault", "injected", "survived", "lost", "wrong", "")
EXPLANATION = """Written by `make faults`: each kind of fault, each fault, and where. Survived means: nothing missing (lost) and
nothing other than without the fault (wrong); what exactly, each test says."""
ROWS: list[tuple] = []  # of all workers
MINUTES = [0.0]


@dataclass
class Outcome:
    """What came of a fault; of several, the part of its name before the colon is the kind."""

    fault: str
    injected: int = 0
    lost: int = 0  # of them: something was missing afterwards
    wrong: int = 0  # of them: something was other than without the fault
    details: str = ""

    def row(self) -> tuple:
        """As in HEADERS."""
        return self.fault, self.injected, max(self.injected - self.lost - self.wrong, 0), self.lost, self.wrong, self.details


@pytest.fixture
def outcome(record_property: Callable[[str, object], None]) -> Iterator[Callable[[str], Outcome]]:
    """Begins a row of the table. The test fails unless every fault in its rows was survived."""
    outcomes: list[Outcome] = []

    def begin(fault: str) -> Outcome:
        outcomes.append(Outcome(fault))
        return outcomes[-1]

    yield begin
    for result in outcomes:
        record_property("outcome", result.row())
    assert [result for result in outcomes if result.lost or result.wrong] == []


def table(rows: list[tuple]) -> str:
    """The table of some rows."""
    return tabulate(rows, HEADERS, tablefmt="github")


def by_kind(rows: list[tuple]) -> list[tuple]:
    """A row per kind of fault, its numbers summed up."""
    kinds: dict[str, list[tuple]] = {}
    for row in rows:
        kinds.setdefault(row[0].partition(":")[0], []).append(row)
    sums = {kind: map(sum, zip(*(row[1:5] for row in of_kind), strict=True)) for kind, of_kind in kinds.items()}
    return [(kind, *sums[kind], of_kind[0][5] if len(of_kind) == 1 else "") for kind, of_kind in kinds.items()]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the rows, also from the workers of xdist."""
    MINUTES[0] += report.duration / 60
    if report.when == "teardown":
        ROWS.extend(value for name, value in report.user_properties if name == "outcome")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page."""
    if FULL and not hasattr(session.config, "workerinput"):
        rows = sorted(map(tuple, ROWS))
        code = commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")
        where = {"commit": code, "minutes, of all tests together": f"{MINUTES[0]:.1f}"} | machine()
        page = [
            "# Faults",
            EXPLANATION,
            table(by_kind(rows)),
            table(rows),
            tabulate([where], "keys", "github", disable_numparse=True),
        ]
        write_atomic(RESULTS, "\n\n".join(page) + "\n")
