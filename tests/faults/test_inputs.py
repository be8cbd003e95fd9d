"""What is damaged, malformed or malicious is refused in one line; no code in it is run, no memory taken on its word.

A reader must accept an input or refuse it with a `UserError` (a request: with a 4xx) within 10 s, run no code that is in it, and
need less than 300 MiB for it. The inputs are always the same.
"""

import faulthandler
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from studies import study
from tests.faults.conftest import FULL
from tests.faults.readers import PICKLE, READERS, Reader, npy

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]
PATIENCE = 10  # seconds for one input, after which the process ends with a traceback
COUNT = -(-10_000 // len(READERS)) if FULL else 10
SETTINGS = settings(
    max_examples=COUNT, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Reader]]:
    """A reader by name, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ROOT", study.ROOT)  # a reader sets it
        yield functools.cache(lambda name: READERS[name](tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_accepted_and_malformed_ones_are_refused_in_one_line(readers, recwarn, name: str):
    reader = readers(name)
    assert reader.judge(reader.valid) == ("accepted", "")
    recwarn.clear()
    for number, content in enumerate(reader.malformed):
        verdict, message = reader.judge(content)
        assert (verdict, reader.path.stem in message) == ("refused", True), f"{number}: {content[:200]}: {message}"
    assert reader.path.suffix in (".npy", ".npz") or not recwarn.list, "one line"  # NumPy warns of some headers


@pytest.mark.parametrize("name", READERS)
def test_no_input_harms_a_reader(readers, outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    reader, row = readers(name), outcome(f"malformed input: {name}")
    monkeypatch.chdir(tmp_path)
    reader.judge(reader.valid)

    @SETTINGS
    @given(reader.contents())
    def judge(content: bytes) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
        verdict, message = reader.judge(content)
        faulthandler.cancel_dump_traceback_later()
        row.injected += 1
        row.wrong += verdict not in ("accepted", "refused")
        assert verdict in ("accepted", "refused"), message

    judge()


HARM = {
    "crashed": lambda: {}["missing"],
    "large": lambda: b"x" * 400 * 2**20,
    "executed": lambda: os.system("true"),
    "executed, too": lambda: np.load(io.BytesIO(npy("|O", (1,), PICKLE)), allow_pickle=True),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str):
    monkeypatch.chdir(tmp_path)
    verdict, _ = Reader(tmp_path / "a", b"", lambda path: (path.read_bytes(), HARM[harm]())).judge(b"x")
    assert verdict == harm.partition(",")[0]
