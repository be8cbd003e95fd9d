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
from tests.conftest import stages_run
from tests.faults.conftest import FULL

pytestmark = pytest.mark.faults
STAGES = [] if FULL else ["train_teacher", "evaluate@distillation"]  # all of both tracks, or these
LEFT = (5 * 2**20, 2**18)  # bytes
OBSERVED = ("costs.json", "report.md", "report.html", "summary.png")  # differ from run to run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; where that is not allowed, the test is skipped."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4G", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_spoils_nothing(disk: Path, outcome):
    checkout, stopped = copy_checkout(disk / "checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0]), 0
    output = checkout.dvc("repro", *STAGES)
    stages, expected, outcome.fault = STAGES or stages_run(output), _results(checkout), "disk with 5 MB or 256 kB left"
    for stage in stages:
        for left in LEFT:
            shutil.rmtree(checkout.folder / ".trainings", ignore_errors=True)  # or a finished one would be taken
            with (disk / "filler").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - left, 1))
            done = checkout.run("dvc", "repro", "--force", "--single-item", stage, expect=None)
            (disk / "filler").unlink()
            stopped += done.returncode != 0
            output = (done.stdout + done.stderr).lower()
            clear = "traceback" not in output and any(text in output for text in ("no space left", "disk is full"))
            if done.returncode and not clear:
                print(f"{stage}, {left} bytes left: {output}")
                outcome.wrong += 1
        checkout.dvc("repro", "--single-item", stage)
        if different := expected.items() ^ _results(checkout).items():
            print(f"{stage}: other results than before: {different}")
            outcome.lost += 1
    outcome.injected, outcome.details = len(stages) * len(LEFT), f"{stopped} stages stopped"


def _results(checkout: Checkout) -> dict[str, str]:
    """The files that the stages wrote, partial ones too, with the MD5 of those that are the same in every run."""
    outputs = {path: md5 for path, md5 in checksums(checkout.folder).items() if path.startswith(("data/", "models/", "metrics/"))}
    return {path: "" if path.endswith(OBSERVED) else md5 for path, md5 in outputs.items()}
