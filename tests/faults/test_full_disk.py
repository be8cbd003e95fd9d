"""A disk that fills up: the project on a small file system of its own, a few megabytes or none left when a stage starts.

The stage either ends well or says in one line that there is no space; every other result is as it was, and the stage ends well
once there is room, with the results of an undisturbed run.
"""

import contextlib
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
OBSERVED = ("costs.json", "report.md", "report.html", "size.png")  # differ from run to run


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a file system of its own on `folder`; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_spoils_nothing(tmp_path: Path, outcome):
    row = outcome("disk with 5 MB or 256 kB left")
    with small_disk(tmp_path / "disk"):
        checkout = copy_checkout(tmp_path / "disk/checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0])
        output = checkout.dvc("repro", *STAGES)
        stages = STAGES or [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
        expected, stopped = _results(checkout), 0
        for stage in stages:
            for left in LEFT:
                done = _run_on_full_disk(checkout, stage, left)
                output = (done.stdout + done.stderr).lower()
                clear = "traceback" not in output and any(text in output for text in ("no space left", "disk is full"))
                stopped += done.returncode != 0
                if done.returncode and not clear:
                    print(f"{stage}, {left} bytes left: {output}")
                    row.wrong += 1
            checkout.dvc("repro", "--single-item", stage)
            if different := expected.items() ^ _results(checkout).items():
                print(f"{stage}: other results than before: {different}")
                row.lost += 1
        row.injected, row.details = len(stages) * len(LEFT), f"{stopped} stages stopped"


def _run_on_full_disk(checkout: Checkout, stage: str, left: int) -> subprocess.CompletedProcess:
    """Run a stage, without finished trainings to take, with so many bytes left."""
    shutil.rmtree(checkout.folder / ".trainings", ignore_errors=True)
    filler = checkout.folder.parent / "filler"
    space = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(space.f_bavail * space.f_frsize - left, 1))
    try:
        return checkout.run("dvc", "repro", "--force", "--single-item", stage, expect=None)
    finally:
        filler.unlink()


def _results(checkout: Checkout) -> dict[str, str]:
    """The files that the stages wrote, partial ones too, with the MD5 of those that are the same in every run."""
    outputs = {path: md5 for path, md5 in checksums(checkout.folder).items() if path.startswith(("data/", "models/", "metrics/"))}
    return {path: "" if path.endswith(OBSERVED) else md5 for path, md5 in outputs.items()}
