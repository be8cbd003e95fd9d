"""What is damaged or hostile is refused in one line; no code in it is run, no memory taken on its word."""

import asyncio
import io
import json
import os
import pickle
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

from pipeline.core.errors import LONGEST, UserError, one_line
from pipeline.data.npy import read_npy, read_npz
from pipeline.serving.server import LIMIT, GuardBody
from studies import study
from tests.conftest import write_npz
from tests.faults import hostile_input, mutations
from tests.faults.hostile_input import READERS, SIGN, Reader, bombard, hostile, judge, outcome


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Reader, Path]]]:
    """A reader and its folder by name, made once."""
    made: dict[str, tuple[Reader, Path]] = {}
    before, root = dict(os.environ), study.ROOT

    def get(name: str) -> tuple[Reader, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = READERS[name](folder), folder
        return made[name]

    yield get
    os.environ.clear()
    os.environ.update(before)
    study.ROOT = root  # the readers set both, each for a process of its own


@pytest.mark.parametrize("name", [name for name in READERS if name != "mnist"])
def test_valid_input_is_accepted(readers, name: str):
    reader, _ = readers(name)
    assert judge(reader.read, reader.seed) == ("accepted", "")


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=50,
    derandomize=True,
    deadline=10_000,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(random=st.randoms(use_true_random=False))
def test_no_mutated_input_harms_a_reader(readers, name: str, random: Random):
    reader, folder = readers(name)
    verdict, message = judge(reader.read, hostile(reader, random, folder))
    assert verdict in ("accepted", "refused"), message
    assert not (folder / SIGN).exists()


def harmful(folder: Path) -> Reader:
    """Each input gets the next of seven fates; the file HARMS, which outlives the process, says which is next."""
    harms = Path(os.environ["HARMS"])

    def read(content: bytes) -> None:
        if content == b"seed":
            return
        number = harms.stat().st_size if harms.exists() else 0
        with harms.open("ab") as file:
            file.write(b".")
        match number:
            case 1:
                raise UserError("refused")
            case 2:
                raise ValueError
            case 3:
                bytearray(b"x" * 200 * 2**20)
            case 4:
                (folder / SIGN).mkdir()
            case 5:
                time.sleep(60)
            case 6:
                os._exit(3)

    return Reader(b"seed", lambda random: b"mutated", read)


def test_harm_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HARMS", str(tmp_path / "harms"))
    monkeypatch.setattr(hostile_input, "PATIENCE", 2)
    tally = bombard(harmful, 7)
    assert tally.injected == 7
    assert tally.verdicts == {"accepted": 3, "refused": 1, "crashed": 2, "hung": 1, "executed": 1}
    assert tally.peak > 100
    assert any("ValueError" in message for message in tally.messages)
    assert any("the process ended" in message for message in tally.messages)
    assert outcome("harmful", tally)[1:5] == (7, 3, 0, 4)


def array(descr: str = "|u1", shape: tuple = (20, 8, 8, 1), data: bytes = b"", header: str | None = None) -> bytes:
    """Prepared images as the reader takes them."""
    return b"I" + mutations.array_file(descr, shape, data, header)


def checkpoint(change: dict, double: bool = False) -> Callable[[bytes], bytes]:
    """A checkpoint with another description, or with weights of another type."""

    def changed(seed: bytes) -> bytes:
        header = json.loads(seed[8 : 8 + int.from_bytes(seed[:8], "little")])
        description = json.loads(header["__metadata__"]["description"])
        dataset = description["dataset"] | change.get("dataset", {})
        tensors = {name: tensor.double() if double else tensor for name, tensor in load(seed).items()}
        return save(tensors, {"description": json.dumps(description | change | {"dataset": dataset})})

    return changed


def png(width: int, height: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, kind)
    return stream.getvalue()


def large_png() -> bytes:
    """A PNG file that says it has 2.5 billion pixels."""
    small = png(28, 28)
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


ENTRIES = [(f"{split}_{part}.npy", b"") for split in ("train", "test") for part in ("images", "labels")]
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20))
UNKNOWN_TYPE = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'
ARGUMENTS = ({"width": 4096, "hidden": 65_536}, {"hidden": 10**12}, {"width": 10**30}, {"name": "resnet18"})
DATASETS = ({"image_shape": [60_000, 60_000, 1]}, {"image_shape": [10**12, 8, 1]}, {"classes": ["x"] * 200_000}, {"std": 0})
IMAGES = (large_png(), png(28, 28)[:-20], png(10_000, 10_000), png(28, 28, "GIF"), png(28, 28, "EPS"), b"")
BODIES = (
    *(b"", b'{"inputs": []}', b'{"inputs": [[[[NaN]]]]}', b'{"inputs": [' + b"[[[[[[0]]]]]]," * 250_000 + b"0]}"),
    *(b'{"inputs": [' + b"[]," * 1_000_000 + b"[]]}", b'{"instances": [' + b'{"":1},' * 500_000 + b"0]}"),
    b'{"inputs": ["' + b"x" * 2_000_000 + b'"' + b',"a"' * 400_000 + b"]}",
)
HOSTILE: dict[
    str, list[tuple[bytes | Callable[[bytes], bytes], str]]
] = {  # by reader: input, or what makes it of a valid one; message
    "own_images": [
        (mutations.archive(ENTRIES, bomb="train_images.npy"), r"own\.npz.*3,2\d\d,\d\d\d,\d\d\d bytes, over 100 times")
    ],
    "prepared_arrays": [
        *((array(shape=shape), r"train.images\.npy") for shape in [(2**40,), (-1, 8, 8, 1), (10**30,)]),
        (array("<U0", (2**40,)), "not prepared images"),  # of no memory
        (array("|O", (1,), pickle.dumps([1])), r"images\.npy"),
        (array(header="(" * 4000), r"images\.npy"),
        (array(data=bytes(1281)), "1 bytes more"),
        (array("<U5", data=bytes(25_600)), "not prepared images"),
        (array(shape=(19, 8, 8, 1), data=bytes(1216)), "not prepared images"),  # fewer than the labels
    ],
    "checkpoint": [
        *((checkpoint({"arguments": {"width": 2, "hidden": 4} | changed}), "seed0") for changed in ARGUMENTS),
        *((checkpoint({"dataset": changed}), "seed0") for changed in DATASETS),
        (checkpoint({}, double=True), "float64"),
    ],
    "initial_weights": [(struct.pack("<Q", len(UNKNOWN_TYPE)) + UNKNOWN_TYPE + b"abcd", r"resnet18\.safetensors")],
    "parameters": [
        *((text.encode(), r"params\.yaml") for text in (LAUGHS, LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "- 1\n- 2")),
        *(
            (b"x: " + text, r"params\.yaml")
            for text in (b"[" * 5000, b"9" * 5000, b"0x" + b"f" * 50_000, b"2001-99-99", b"y" * 200_000)
        ),
        (f"!!python/object/apply:os.mkdir [{SIGN}]".encode(), r"params\.yaml"),
    ],
    "stage_json": [(text, r"a\.json.*dvc repro") for text in (b"[1, 2]", b"[" * 100_000, b"\xff", b"")],
    "image": [(content, r"a\.png") for content in IMAGES],
    "exported_student": [(content, r"student\.onnx.*dvc repro export_student") for content in (b"", b"\xff" * 100)],
    "request": [  # the first byte stands for the type: JSON, CSV, parquet, none
        *((content, "415") for content in (b"\1a,b\n1,2", b"\2PAR1", b"\3")),
        *((b"\0" + body, "400") for body in BODIES),
        (b"\0" + b"x" * (LIMIT + 1), "413"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [pytest.param(name, *row, id=f"{name}{n}") for name, rows in HOSTILE.items() for n, row in enumerate(rows)],
)
def test_hostile_input_is_refused_in_one_line_and_takes_no_memory(
    readers, recwarn: pytest.WarningsRecorder, name: str, content: bytes | Callable[[bytes], bytes], message: str
):
    reader, _ = readers(name)
    before, warnings = peak(), len(recwarn)
    verdict, reason = judge(reader.read, content(reader.seed) if callable(content) else content)
    assert verdict == "refused", reason
    assert re.search(message, reason)
    assert peak() - before < 300
    assert len(recwarn) == warnings, "one line"
    assert not Path(SIGN).exists()


def peak() -> float:
    """MiB, from the last call on."""
    value = hostile_input._peak_of()
    Path("/proc/self/clear_refs").write_text("5")
    return value


def test_images_that_compress_well_are_no_bomb(tmp_path: Path):
    zeros = np.zeros((60_000, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "blank.npz", images=zeros)
    assert (tmp_path / "blank.npz").stat().st_size < zeros.nbytes / 100
    assert read_npz(tmp_path / "blank.npz", ["images"])["images"].shape == zeros.shape


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("values", [np.arange(24).reshape(2, 3, 4), np.zeros((0, 8)), np.array(["a", "bc"]), np.array(3)])
def test_arrays_come_back_as_they_were(tmp_path: Path, values: np.ndarray, order: str):
    values = np.asarray(values, order=order)
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "a.npz", a=values, other=values)
    for actual in (read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz", ["a", "b"])["a"]):
        np.testing.assert_array_equal(actual, values)
        assert actual.dtype == values.dtype


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path: Path):
    path = write_npz(tmp_path / "own.npz")
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        read_npz(path, ["train_images"])


def test_a_message_is_one_printable_line():
    assert one_line("a\n b\x1b[2J\u2028c") == "a b?[2J c"
    assert len(one_line("x" * 10**6)) < LONGEST + 10


def test_an_image_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.png.*not a file"):
            hostile_input.read_image(tmp_path / f"{name}.png", (28, 28, 1))


def test_an_exported_student_reads_no_file_but_its_own(readers, tmp_path: Path):
    reader, folder = readers("exported_student")
    model = onnx.load_from_string(reader.seed)
    weights = model.graph.initializer[0]
    (folder.parent / "secret").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret")
    assert judge(reader.read, model.SerializeToString())[0] == "refused"


def test_a_body_in_a_million_parts_is_put_together_in_time():
    received, statuses, parts = [], [], 2_000_000

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        received.append(await receive())

    async def receive() -> dict:
        nonlocal parts
        parts -= 1
        return {"type": "http.request", "body": b" ", "more_body": parts > 0}

    async def send(message: dict) -> None:
        statuses.append(message.get("status"))

    start = time.process_time()
    asyncio.run(GuardBody(app, LIMIT, (8, 8, 1))({"type": "http", "method": "GET", "headers": []}, receive, send))
    assert received[0]["body"] == b" " * 2_000_000
    assert not statuses
    assert time.process_time() - start < 10
