"""A disk that fills up: the project on a small file system of its own, a few megabytes or none left when a stage starts.

It counts as survived if the stage either ends well or says in one line that there is no space, if every other result is as it
was, and if the stage ends well once there is room, with the results of a calm run.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.checkout import SMALL, Checkout, copy_checkout
from faults.outcome import Outcome
from pipeline.core.files import md5

SIZE = "4G"
LEFT = (5 * 2**20, 2**18)  # bytes
RESULTS = ("data", "models", "metrics", "dvc.lock")
OBSERVED = ("costs.json", "report.md", "report.html", "report_size.png")  # differ from run to run


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
    what = "disk with 5 MB or 256 kB left"
    with small_disk(folder) as mounted:
        if not mounted:
            return Outcome(what, 0, 0, 0, 0, "not run: mounting a file system needs root")
        checkout = copy_checkout(folder / "checkout", **SMALL, baselines__epochs=1, distillation__epochs=1, seeds=[0])
        output = checkout.dvc("repro", *only)
        stages = only or [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
        calm = results(checkout)
        injected = lost = wrong = stopped = unclear = 0
        for stage in stages:
            for left in LEFT:
                injected += 1
                said_it, spoilt = _fill(checkout, stage, left, calm)
                stopped += said_it is not None
                unclear += said_it is False
                lost += spoilt
            checkout.dvc("repro", "--single-item", stage)
            again = results(checkout)
            differs = {path for path in calm if again.get(path) != calm[path] and not path.endswith(OBSERVED)}
            if differs - {"dvc.lock"}:
                print(f"{stage}: other results than before: {sorted(differs)}")
                wrong += 1
            calm = again
        survived = injected - lost - wrong - unclear
        told = f"{stopped} stages stopped, {stopped - unclear} with one clear line"
        return Outcome(what, injected, survived, lost, wrong + unclear, told)


def _fill(checkout: Checkout, stage: str, left: int, calm: dict[str, str]) -> tuple[bool | None, bool]:
    """Run a stage on a full disk.

    Whether it said so, None if it ended well; and whether it spoilt results of other stages.
    """
    filler = checkout.folder.parent / "filler"
    space = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(space.f_bavail * space.f_frsize - left, 1))
    try:
        done = checkout.run("dvc", "repro", "--force", "--single-item", stage, expect=None)
    finally:
        filler.unlink()
    said = done.stdout + done.stderr
    clear = "Traceback" not in said and any(text in said.lower() for text in ("no space left", "disk is full"))
    own = outputs(checkout, stage)
    now = results(checkout)
    spoilt = [path for path in calm if now.get(path) != calm[path] and not path.startswith(own) and path != "dvc.lock"]
    if spoilt or (done.returncode and not clear):
        print(f"{stage}, {left} bytes left: spoilt {spoilt}; it said: {said}")
    return (clear if done.returncode else None), bool(spoilt)


def results(checkout: Checkout) -> dict[str, str]:
    """The MD5 of every file that the stages wrote, by path; a partial file left behind would be there too."""
    paths = [path for name in RESULTS for path in [checkout.folder / name, *(checkout.folder / name).rglob("*")]]
    return {str(path.relative_to(checkout.folder)): md5(path) for path in paths if path.is_file()}


def outputs(checkout: Checkout, stage: str) -> tuple[str, ...]:
    """The paths that a stage writes."""
    from dvc.repo import Repo

    with Repo(str(checkout.folder)) as repo:
        (found,) = [one for one in repo.index.stages if one.name == stage]
        return tuple(out.def_path for out in found.outs)
