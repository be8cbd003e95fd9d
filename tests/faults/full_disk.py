"""A disk that fills up: the project on a small file system of its own, a few megabytes or none left when a stage starts.

It counts as survived if the stage either ends well or says in one line that there is no space, if every other result is as it
was, and if the stage ends well once there is room, with the results of an undisturbed run.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline.core.files import md5
from tests.faults.checkout import SMALL, Checkout, Outcome, copy_checkout

SIZE = "4G"
LEFT = (5 * 2**20, 2**18)  # bytes
RESULTS = ("data", "models", "metrics", "dvc.lock")
OBSERVED = ("costs.json", "report.md", "report.html", "size.png", "dvc.lock")  # differ from run to run


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of its own on `folder`; False where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_disk(folder: Path, only: tuple[str, ...] = ()) -> Outcome:
    """Every stage of both tracks, or those in `only`, with each of LEFT bytes left."""
    title = "disk with 5 MB or 256 kB left"
    with small_disk(folder) as mounted:
        if not mounted:
            return Outcome(title, 0, 0, 0, 0, "not run: mounting a file system needs root")
        checkout = copy_checkout(folder / "checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0])
        output = checkout.dvc("repro", *only)
        stages = only or [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
        expected = results(checkout)
        injected = lost = wrong = stopped = unclear = 0
        for stage in stages:
            for left in LEFT:
                injected += 1
                clear, spoilt = _fill(checkout, stage, left, expected)
                stopped += clear is not None
                unclear += clear is False
                lost += spoilt
            checkout.dvc("repro", "--single-item", stage)
            actual = results(checkout)
            paths = (path for path in expected if not path.endswith(OBSERVED))
            if different := [path for path in paths if actual.get(path) != expected[path]]:
                print(f"{stage}: other results than before: {different}")
                wrong += 1
            expected = actual
        details = f"{stopped} stages stopped, {stopped - unclear} with one clear line"
        return Outcome(title, injected, injected - lost - wrong - unclear, lost, wrong + unclear, details)


def _fill(checkout: Checkout, stage: str, left: int, expected: dict[str, str]) -> tuple[bool | None, bool]:
    """Run a stage on a full disk, without finished trainings to take.

    Whether it said so in a clear line, None if it ended well; and whether it spoilt results of other stages.
    """
    shutil.rmtree(checkout.folder / ".trainings", ignore_errors=True)
    filler = checkout.folder.parent / "filler"
    space = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(space.f_bavail * space.f_frsize - left, 1))
    try:
        done = checkout.run("dvc", "repro", "--force", "--single-item", stage, expect=None)
    finally:
        filler.unlink()
    output = done.stdout + done.stderr
    clear = "Traceback" not in output and any(text in output.lower() for text in ("no space left", "disk is full"))
    ignored = (*outputs(checkout, stage), "dvc.lock")
    actual = results(checkout)
    spoilt = [path for path in expected if actual.get(path) != expected[path] and not path.startswith(ignored)]
    if spoilt or (done.returncode and not clear):
        print(f"{stage}, {left} bytes left: spoilt {spoilt}; its output: {output}")
    return (clear if done.returncode else None), bool(spoilt)


def results(checkout: Checkout) -> dict[str, str]:
    """The MD5 of every file that the stages wrote, by path; a partial file left behind would be there too."""
    paths = [path for name in RESULTS for path in [checkout.folder / name, *(checkout.folder / name).rglob("*")]]
    return {str(path.relative_to(checkout.folder)): md5(path) for path in paths if path.is_file()}


def outputs(checkout: Checkout, stage: str) -> tuple[str, ...]:
    """The paths that a stage writes."""
    lock = yaml.safe_load((checkout.folder / "dvc.lock").read_text())
    return tuple(output["path"] for output in lock["stages"][stage]["outs"])
