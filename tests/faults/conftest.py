"""How many faults there are, and what came of them: a table, which `make faults` writes to results.md.

With the variable FAULTS set there are all of them, else a fast cut.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from pipeline.core.files import write_atomic
from pipeline.core.provenance import code_is_committed, commit, machine
from tests.checkout import SMALL, Checkout, checksums, copy_checkout

FULL = "FAULTS" in os.environ
RESULTS = Path(__file__).with_name("results.md")
EXPLANATION = """Written by `make faults`: each kind of fault, each fault, and where. Survived means: nothing missing (lost) and
nothing other than without the fault (wrong); what exactly, each test says."""
STUDENTS = "models/distillation/student_alone"
EPOCHS, SEEDS = 8, [0, 1, 2, 3] if FULL else [0, 1]


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the page: a row for each kind of fault, its numbers summed up, a row for each fault, and where."""
    reports = [report for of_kind in terminalreporter.stats.values() for report in of_kind if hasattr(report, "when")]
    outcomes = [value for report in reports if report.when == "teardown" for _, value in report.user_properties]
    if not (FULL and outcomes):
        return
    frame = pd.DataFrame(outcomes).sort_values("fault").rename(columns={"details": ""})
    frame.insert(2, "survived", (frame["injected"] - frame["lost"] - frame["wrong"]).clip(0))
    kinds = frame.drop(columns="fault").groupby(frame["fault"].str.partition(":")[0].rename("fault")).sum().reset_index()
    code = commit()[:12] + ("" if code_is_committed() else " with uncommitted changes")
    minutes = sum(report.duration for report in reports) / 60
    where = pd.DataFrame([{"commit": code, "minutes, of all tests together": f"{minutes:.1f}"} | machine()])
    tables = [rows.to_markdown(index=False, tablefmt="github", disable_numparse=rows is where) for rows in (kinds, frame, where)]
    write_atomic(RESULTS, "\n\n".join(["# Faults", EXPLANATION, *tables]) + "\n")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose students were trained alone, undisturbed; `expected` has the MD5 of their checkpoints."""
    checkout = copy_checkout(tmp_path_factory.mktemp("trained"), **SMALL, distillation__epochs=EPOCHS, seeds=SEEDS)
    checkout.dvc("repro", "train_student_alone")
    checkout.expected = checksums(checkout.folder / STUDENTS)
    return checkout


@pytest.fixture
def untrained(trained: Checkout, request: pytest.FixtureRequest) -> Checkout:
    """The same checkout with the data alone, and an experiment in MLflow of the test's own."""
    for folder in (STUDENTS, ".trainings"):
        shutil.rmtree(trained.folder / folder, ignore_errors=True)
    checkout = Checkout(trained.folder, experiment=request.node.name)
    checkout.set(distillation__epochs=EPOCHS, seeds=SEEDS, tracking__experiment=checkout.experiment)
    checkout.expected = trained.expected
    return checkout
