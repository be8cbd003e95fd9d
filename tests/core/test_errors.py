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


IMPOSSIBLE = {"~nosuchuser/x.npz": "home directory", f"{'x' * 300}.npz": "File name too long", "a\0b/x.npz": "no such"}


@pytest.mark.parametrize("dataset", IMPOSSIBLE)
def test_a_path_that_cannot_be_is_one_line(tmp_path: Path, dataset: str):
    output = {"capture_output": True, "text": True, "check": False}
    code = "from pipeline.core.cli import run; from pipeline.fetching.sources import read_source; import sys\n"
    code += f"run(lambda: read_source({dataset!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **output)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert IMPOSSIBLE[dataset] in done.stderr
