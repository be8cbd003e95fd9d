"""A disk that fills up: the project on a small file system of its own, a few megabytes or none left when a stage starts.

The stage either ends well or says in one line that there is no space; every other result is as it was, and the stage ends well
once there is room, with the results of an undisturbed run.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkout import SMALL, Checkout, checksums, copy_checkout
from tests.faults.conftest import FULL

pytestmark = pytest.mark.faults
STAGES = [] if FULL else ["train_teacher", "evaluate@distillation"]  # all of both tracks, or these
SIZE = "4G"
LEFT = (5 * 2**20, 2**18)  # bytes
OBSERVED = ("costs.json", "report.md", "report.html", "summary.png")  # differ from run to run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; where that is not allowed, the test is skipped."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_spoils_nothing(disk: Path, outcome):
    outcome.fault, stopped = "disk with 5 MB or 256 kB left", 0
    checkout = copy_checkout(disk / "checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0])
    output = checkout.dvc("repro", *STAGES)
    stages = STAGES or [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
    expected = _results(checkout)
    for stage in stages:
        for left in LEFT:
            done = _run_on_full_disk(checkout, stage, left)
            output = (done.stdout + done.stderr).lower()
            clear = "traceback" not in output and any(text in output for text in ("no space left", "disk is full"))
            stopped += done.returncode != 0
            if done.returncode and not clear:
                print(f"{stage}, {left} bytes left: {output}")
                outcome.wrong += 1
        checkout.dvc("repro", "--single-item", stage)
        if different := expected.items() ^ _results(checkout).items():
            print(f"{stage}: other results than before: {different}")
            outcome.lost += 1
    outcome.injected, outcome.details = len(stages) * len(LEFT), f"{stopped} stages stopped"


def _run_on_full_disk(checkout: Checkout, stage: str, left: int) -> subprocess.CompletedProcess:
    """Run a stage, without finished trainings to take, with so many bytes left."""
    shutil.rmtree(checkout.folder / ".trainings", ignore_errors=True)
    filler, free = checkout.folder.parent / "filler", shutil.disk_usage(checkout.folder).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))
    try:
        return checkout.run("dvc", "repro", "--force", "--single-item", stage, expect=None)
    finally:
        filler.unlink()


def _results(checkout: Checkout) -> dict[str, str]:
    """The files that the stages wrote, partial ones too, with the MD5 of those that are the same in every run."""
    outputs = {path: md5 for path, md5 in checksums(checkout.folder).items() if path.startswith(("data/", "models/", "metrics/"))}
    return {path: "" if path.endswith(OBSERVED) else md5 for path, md5 in outputs.items()}
