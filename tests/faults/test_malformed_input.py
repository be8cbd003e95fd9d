"""What is damaged or malicious is refused in one line; no code in it is run, no memory taken on its word."""

import asyncio
import functools
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from pipeline.core.errors import LONGEST, UserError, one_line
from pipeline.data.npy import SMALL, read_npy, read_npz
from pipeline.export.onnx_model import Student
from pipeline.serving.predict import read_image
from pipeline.serving.server import application
from studies import study
from tests.faults import malformed_input
from tests.faults.malformed_input import PICKLE, READERS, Reader, exported_student, npy

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Reader]]:
    """A reader by name, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ROOT", study.ROOT)  # a reader sets it, for a process of its own
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
def test_no_mutated_input_harms_a_reader(readers, name: str):
    for number in range(50):
        verdict, message = readers(name).judge(readers(name).mutated(Random(f"{name} {number}")))
        assert verdict in ("accepted", "refused"), f"{number}: {message}"


HARM = {
    "nothing": lambda: None,
    "crashed": lambda: {}["missing"],
    "large": lambda: b"x" * 400 * 2**20,
    "executed": lambda: os.system("true"),
    "pickle.find_class": lambda: np.load(io.BytesIO(npy("|O", (1,), PICKLE)), allow_pickle=True),
    "Timeout": lambda: time.sleep(60),
    "Aborted": lambda: os.abort(),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_counted(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, harm: str):
    def read(path: Path) -> object:
        return path.read_bytes(), HARM[harm]()

    monkeypatch.setattr(malformed_input, "CONTEXT", multiprocessing.get_context("fork"))  # has what is patched
    monkeypatch.setattr(malformed_input, "PATIENCE", 4)
    monkeypatch.setattr(Reader, "mutated", lambda *_: b"x")
    monkeypatch.setattr(malformed_input, "READERS", {"reader": lambda folder: Reader(folder / "a", b"", read)})
    ((_, injected, survived, _, wrong, _),) = malformed_input.malformed_input(2)
    assert (injected, survived, wrong) == ((2, 2, 0) if harm == "nothing" else (2, 0, 2))
    assert harm == "nothing" or harm in capfd.readouterr().out


def test_a_bomb_is_not_unpacked(tmp_path: Path):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros(2 * SMALL, np.uint8))
    with pytest.raises(UserError, match=r"bomb\.npz.*134,\d\d\d,\d\d\d bytes, over 100 times"):
        read_npz(tmp_path / "bomb.npz", ["images"])


BLANK = np.zeros((60_000, 28, 28), np.uint8)  # compresses as well as a bomb


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("values", [np.arange(24).reshape(2, 3, 4), np.zeros((0, 8)), np.array(["a", "bc"]), np.array(3), BLANK])
def test_arrays_come_back_as_they_were(tmp_path: Path, values: np.ndarray, order: str):
    values = np.asarray(values, order=order)
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "a.npz", a=values, other=values)
    for actual in (read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz", ["a", "b"])["a"]):
        np.testing.assert_array_equal(actual, values)
        assert actual.dtype == values.dtype


def test_a_message_is_one_printable_line():
    assert one_line("a\n b\x1b[2J\u2028c") == "a b?[2J c"
    assert len(one_line("x" * 10**6)) < LONGEST + 10


def test_an_image_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.png.*not a file"):
            read_image(tmp_path / f"{name}.png", (28, 28, 1))


def test_a_body_in_a_million_parts_is_read_in_time(tmp_path: Path):
    """It is 2,000,000 spaces, no JSON, and refused as such: read whole, in seconds."""
    app, parts, sent = application(Student(exported_student(tmp_path).path)), iter(range(2_000_000, 0, -1)), []

    async def receive() -> dict:
        return {"type": "http.request", "body": b" ", "more_body": next(parts) > 1}

    async def send(message: dict) -> None:
        sent.append(message)

    start = time.process_time()
    asyncio.run(app({"type": "http", "method": "POST", "path": "/invocations", "headers": []}, receive, send))
    assert (sent[0]["status"], next(parts, None)) == (400, None)
    assert time.process_time() - start < 20
