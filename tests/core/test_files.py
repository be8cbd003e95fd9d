"""Files are written atomically, and what a killed process left of one goes with the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.core.files import atomic_folder, write_atomic

ROOT = Path(__file__).parents[2]
DIES = """
import os, signal, sys
from pathlib import Path
from tests.core.test_files import write
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
write(sys.argv[1], Path(sys.argv[2]), "new")
"""


def write(kind: str, path: Path, text: str) -> None:
    """Write a file, or a folder with one in it."""
    if kind == "file":
        write_atomic(path, b"very ", text)
    else:
        with atomic_folder(path) as folder:
            write_atomic(folder / "inside", b"very ", text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_inside_the_write_leaves_the_old_and_the_next_write_tidies_up(tmp_path: Path, kind: str):
    path = tmp_path / "results"
    content = path if kind == "file" else path / "inside"
    write(kind, path, "old")
    done = subprocess.run([sys.executable, "-c", DIES, kind, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert content.read_text() == "very old"
    assert len(list(tmp_path.iterdir())) == 2, "the partial one is there too"
    alive = tmp_path / f".results.{os.getppid()}.partial"
    alive.touch()
    write(kind, path, "new")
    assert content.read_text() == "very new"
    assert set(tmp_path.iterdir()) == {path, alive}, "a live process may be writing the same"


def test_a_write_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "results"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results", "old")]
