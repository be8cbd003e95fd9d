"""What a user reads when something is wrong."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import LONGEST, file_problem, one_line
from tests.checkout import ROOT


def test_a_message_is_one_printable_line():
    assert one_line("a\n b\x1b[2J\u2028c") == "a b?[2J c"
    assert len(one_line("x" * 10**6)) < LONGEST + 10


def test_what_a_file_system_refuses_is_told_and_other_errors_are_not():
    assert file_problem(PermissionError(errno.EACCES, "Permission denied", "models")) == "models: Permission denied"
    assert file_problem(OSError(errno.ENOSPC, "No space", "a")).startswith("no space left on the disk while writing a")
    assert file_problem(OSError(errno.EINVAL, "Invalid argument", "a")) is None
    assert file_problem(PermissionError("of a socket")) is None


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """What `pipeline.core.cli.run(main)` does, in a process of its own, of the function `main` in `code`."""
    code = f"from pipeline.core.cli import run\n{code}\nrun(main)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("~nosuchuser/x.npz", b"home directory"), (f"{'x' * 300}.npz", b"File name too long"), ("a\0b/x.npz", b"no such")],
)
def test_a_path_that_cannot_be_is_one_line(dataset: str, message: bytes):
    done = run_python(f"from pipeline.fetching.sources import read_source\ndef main(): read_source({dataset!r})")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert message in done.stderr


def test_what_a_terminal_cannot_show_is_escaped():
    done = run_python(r"def main(): print('\xb1 \u2192')", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (0, rb"\xb1 \u2192" + b"\n"), done.stderr


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        ("pipeline.core.errors UserError", 1),
        ("mlflow.exceptions MlflowException", 1),
        ("sqlalchemy.exc SQLAlchemyError", 1),
        ("builtins RuntimeError", 8),
    ],
)
def test_no_error_shows_a_password(error: str, lines: int):
    module, name = error.split()
    store = "https://someone:hunter2@runs.example"
    code = f"from {module} import {name}\ndef main(): raise {name}('API request to {store}/api failed')"
    done = run_python(code, MLFLOW_TRACKING_URI=store)
    assert (done.returncode, len(done.stderr.splitlines()) <= lines) == (1, True), done.stderr
    assert b"runs.example/api failed" in done.stderr
    assert b"hunter2" not in done.stderr


def test_an_experiment_that_dvc_would_lose_is_not_begun(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/shallow").touch()
    done = run_python("def main(): print('begun')", DVC_STAGE="report", DVC_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"git fetch --unshallow" in done.stderr
