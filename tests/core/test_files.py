"""Files are written atomically, and what a killed process left of one goes with the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.files import atomic_folder, write_atomic

DIES = """
import os, signal, sys
from pathlib import Path
from pipeline.core.files import atomic_folder, write_atomic
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "file":
    write_atomic(Path(sys.argv[2]), "new")
with atomic_folder(Path(sys.argv[2])) as folder:
    (folder / "inside").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_inside_the_write_leaves_the_old_and_the_next_write_tidies_up(tmp_path: Path, kind: str):
    path = tmp_path / "results"
    if kind == "file":
        path.write_text("old")
    else:
        path.mkdir()
        (path / "inside").write_text("old")
    done = subprocess.run([sys.executable, "-c", DIES, kind, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the partial one is there too"
    alive = tmp_path / f".results.{os.getppid()}.partial"
    alive.touch()
    if kind == "file":
        assert path.read_text() == "old"
        write_atomic(path, b"very ", "new")
        assert path.read_text() == "very new"
    else:
        assert (path / "inside").read_text() == "old"
        with atomic_folder(path) as folder:
            (folder / "inside").write_text("new")
        assert (path / "inside").read_text() == "new"
    assert set(tmp_path.iterdir()) == {path, alive}, "a live process may be writing the same"


def test_a_write_that_fails_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "results"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results", "old")]
