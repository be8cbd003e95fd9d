"""What is damaged or hostile is refused in one line; no code in it is run, no memory taken on its word."""

import asyncio
import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from faults import mutations
from faults.hostile_input import READERS, SIGN, Reader, bombard, hostile, judge, outcome
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.data.npy import read_npy, read_npz
from pipeline.data.prepared import load_initial_weights, load_split
from pipeline.core.errors import LONGEST, UserError, one_line
from pipeline.export.onnx_model import Student
from pipeline.core.files import read_json
from pipeline.params import load_params
from pipeline.training.cache import File, Unfinished
from pipeline.serving.registry import read_predictions
from pipeline.serving.predict import read_image
from pipeline.serving.server import LIMIT, GuardBody
from studies import study
from tests.conftest import write_npz
from tests.harmful_reader import harmful

CPU = torch.device("cpu")


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
def test_a_reader_accepts_what_it_should(readers, name: str):
    reader, _ = readers(name)
    assert judge(reader.read, reader.seed) == ("accepted", "")


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=50, derandomize=True, deadline=10_000, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_no_mutated_input_harms_a_reader(readers, name: str, random: Random):
    reader, folder = readers(name)
    became, how = judge(reader.read, hostile(reader, random, folder))
    assert became in ("accepted", "refused"), how
    assert not (folder / SIGN).exists()


def test_harm_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HARMS", str(tmp_path / "harms"))
    monkeypatch.setattr("faults.hostile_input.PATIENCE", 2)
    tally = bombard(harmful, 7)
    assert (tally.injected, tally.accepted, tally.refused, tally.crashed, tally.hung) == (7, 3, 1, 2, 1)
    assert tally.executed == 1
    assert tally.peak > 100
    assert any("ValueError" in how for how in tally.crashes)
    assert any("the process ended" in how for how in tally.crashes)
    assert outcome("harmful", tally)[1:5] == (7, 3, 0, 4)


def bomb(path: Path, **said: object) -> Path:
    """An archive of 3 MB with an array of 3 GiB, which its header and the directory agree on."""
    arrays = [(f"{split}_{part}.npy", b"") for split in ("train", "test") for part in ("images", "labels")]
    path.write_bytes(mutations.archive(arrays, bomb="train_images.npy"))
    return path


def test_an_archive_that_would_unpack_to_gigabytes_is_refused_before_it_does(tmp_path: Path):
    path = bomb(tmp_path / "bomb.npz")
    assert path.stat().st_size < 5 * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.npz.*3,2\d\d,\d\d\d,\d\d\d bytes, over 100 times"):
            read_npz(path, ["train_images", "train_labels"])
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()


def test_images_that_compress_well_are_no_bomb(tmp_path: Path):
    zeros = np.zeros((60_000, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "blank.npz", images=zeros)
    assert (tmp_path / "blank.npz").stat().st_size < zeros.nbytes / 100
    assert read_npz(tmp_path / "blank.npz", ["images"])["images"].shape == zeros.shape


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("array", [np.arange(24).reshape(2, 3, 4), np.zeros((0, 8)), np.array(["a", "bc"]), np.array(3)])
def test_arrays_come_back_as_they_were(tmp_path: Path, array: np.ndarray, order: str):
    array = np.asarray(array, order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", a=array, other=array)
    for found in (read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz", ["a", "b"])["a"]):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path: Path):
    path = write_npz(tmp_path / "own.npz")
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="CRC"):
        read_npz(path, ["train_images"])


PLAIN = mutations.array_file("|u1", (20, 8, 8, 1), bytes(1280))
ARRAYS = {
    "a shape of a TiB": mutations.array_file("|u1", (2**40,), b""),
    "a shape of no memory": mutations.array_file("<U0", (2**40,), b""),
    "a negative shape": mutations.array_file("|u1", (-1, 8, 8, 1), b""),
    "a shape beyond 64 bits": mutations.array_file("|u1", (10**30,), b""),
    "objects": mutations.array_file("|O", (1,), pickle.dumps([1])),
    "a header that is no literal": mutations.array_file("", (), b"", header="{'descr': ("),
    "a header of brackets": mutations.array_file("", (), b"", header="(" * 4000),
    "another version": PLAIN[:6] + b"\x07\x00" + PLAIN[8:],
    "other bytes behind": PLAIN + b"x",
    "an archive": b"PK\x05\x06" + bytes(18),
    "a pickle": pickle.dumps({}),
    "text": mutations.array_file("<U5", (20, 8, 8, 1), bytes(25_600)),
    "other sizes than the labels": mutations.array_file("|u1", (19, 8, 8, 1), bytes(1216)),
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_prepared_images_that_are_none_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "labels.npy", np.zeros(20, np.int64))
    (tmp_path / "train" / "images.npy").write_bytes(PLAIN)
    assert load_split(tmp_path, "train", CPU).images.shape == (20, 8, 8, 1)
    (tmp_path / "train" / "images.npy").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / "train")):
        load_split(tmp_path, "train", CPU)


def zipped(change: Callable[[bytearray], None]) -> bytes:
    """An archive with a field of its directory changed; the directory's entry starts at PK\\1\\2."""
    content = bytearray(mutations.archive([("labels.npy", PLAIN)]))
    change(content)
    return bytes(content)


def put(at: int, value: int) -> Callable[[bytearray], None]:
    """Write a 16-bit field of the directory's entry, and of the local header, which lacks the first 2 bytes of it."""

    def change(content: bytearray) -> None:
        entry = content.index(b"PK\1\2")
        for place in (entry + at, at - 2):
            content[place : place + 2] = struct.pack("<H", value)

    return change


@pytest.mark.parametrize("change", [put(8, 1), put(8, 1 << 5), put(8, 1 << 6), put(10, 1), put(10, 12), put(10, 14), put(10, 99)])
def test_an_archive_that_is_encrypted_or_packed_otherwise_is_refused(tmp_path: Path, change):
    path = tmp_path / "a.npz"
    path.write_bytes(zipped(lambda content: None))
    assert read_npz(path, ["labels"])["labels"].shape == (20, 8, 8, 1)
    path.write_bytes(zipped(change))
    with pytest.raises(UserError, match=r"a\.npz"):
        read_npz(path, ["labels"])


def test_predictions_that_do_not_fit_together_are_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", labels=np.zeros(9, int), seeds=np.arange(2), student_distilled=np.zeros((2, 8), int))
    with pytest.raises(UserError, match="not the predictions"):
        read_predictions(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": {"width": 4096, "hidden": 65_536}},
        {"arguments": {"width": 2, "hidden": 10**12}},
        {"arguments": {"width": 10**30, "hidden": 4}},
        {"arguments": {"width": 2, "hidden": 4, "name": "resnet18"}},
        {"dataset": {"image_shape": [60_000, 60_000, 1]}},
        {"dataset": {"image_shape": [10**12, 8, 1]}},
        {"dataset": {"classes": ["x"] * 200_000}},
        {"dataset": {"std": 0}},
        {"best_epoch": 2},
        {"history": []},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_its_weights_takes_no_memory(tmp_path: Path, change: dict):
    READERS["checkpoint"](tmp_path)
    path = tmp_path / "seed0.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["description"])
    for key, value in change.items():
        described[key] = described[key] | value if key == "dataset" else value
    save_file(tensors, path, {"description": json.dumps(described)})
    before = peak()
    with pytest.raises(UserError, match="seed0"):
        load_checkpoint(path, CPU)
    assert peak() - before < 100


def peak() -> float:
    """MiB, from the last call on."""
    found = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
    Path("/proc/self/clear_refs").write_text("5")
    return found


def test_weights_of_another_type_are_refused(tmp_path: Path):
    READERS["checkpoint"](tmp_path)
    path = tmp_path / "seed0.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match="float64"):
        load_checkpoint(path, CPU)


UNKNOWN_TYPE = b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}'


@pytest.mark.parametrize("content", [b"\xff" * 100, struct.pack("<Q", len(UNKNOWN_TYPE)) + UNKNOWN_TYPE + b"abcd"])
def test_damaged_initial_weights_are_refused(tmp_path: Path, content: bytes):
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial" / "resnet18.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"resnet18\.safetensors"):
        load_initial_weights(tmp_path, "resnet18")


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        LAUGHS.replace("[", "{<<: [").replace("]", "]}"),
        "x: " + "[" * 5000,
        "x: " + "9" * 5000,
        "x: 0x" + "f" * 50_000,
        "x: 2001-99-99",
        "x: !!timestamp y",
        "x: !!bool y",
        "x: !!int ''",
        "!!python/object/apply:os.mkdir [foreign-code-ran]",
        "x: y\0",
        "x: " + "y" * 200_000,
        "- 1\n- 2",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params()
    assert not Path(SIGN).exists()


def test_a_message_is_one_printable_line():
    assert one_line("a\n b\x1b[2J\u2028c") == "a b?[2J c"
    assert len(one_line("x" * 10**6)) < LONGEST + 10


@pytest.mark.parametrize("content", [b"[1, 2]", b"3", b"[" * 100_000, b"\xff", b""])
def test_a_stages_json_that_holds_no_named_values_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json.*dvc repro"):
        read_json(tmp_path / "a.json")


def png(width: int, height: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, kind)
    return stream.getvalue()


def large_header() -> bytes:
    """A PNG file that says it has 2.5 billion pixels."""
    small = png(28, 28)
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    "content",
    [large_header(), png(28, 28)[:-20], png(10_000, 10_000), png(28, 28, "GIF"), png(28, 28, "EPS"), b""],
    ids=["bomb", "truncated", "large", "gif", "eps", "empty"],
)
def test_an_image_that_is_none_is_refused(tmp_path: Path, content: bytes, recwarn: pytest.WarningsRecorder):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png"):
        read_image(tmp_path / "a.png", (28, 28, 1))
    assert not recwarn.list, "one line"


def test_an_image_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.png.*not a file"):
            read_image(tmp_path / f"{name}.png", (28, 28, 1))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_a_damaged_exported_student_is_refused(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "student.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"student\.onnx.*dvc repro export_student"):
        Student(tmp_path / "student.onnx")


def test_an_exported_student_reads_no_file_but_its_own(tmp_path: Path):
    (tmp_path / "models").mkdir()
    READERS["exported_student"](tmp_path).read(READERS["exported_student"](tmp_path).seed)
    model = onnx.load(tmp_path / "student.onnx")
    weights = model.graph.initializer[0]
    (tmp_path / "secret").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret")
    (tmp_path / "models" / "student.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"student\.onnx"):
        Student(tmp_path / "models" / "student.onnx")


def test_any_flipped_bit_makes_progress_start_anew(tmp_path: Path):
    file = File(tmp_path / "a")
    file.save(Unfinished({"weight": torch.ones(3)}, {"epoch": 1}))
    content = file.path.read_bytes()
    assert file.load().facts == {"epoch": 1}
    for at in range(len(content)):
        file.path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert file.load() is None


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (b"text/csv", b"a,b\n1,2", 415),
        (b"application/vnd.apache.parquet", b"PAR1", 415),
        (b"", b"", 415),
        (b"application/json", b"", 400),
        (b"application/json", b'{"inputs": [' + b"[[[[[[0]]]]]]," * 250_000 + b"0]}", 400),
        (b"application/json", b'{"inputs": [' + b"[]," * 1_000_000 + b"[]]}", 400),
        (b"application/json", b'{"instances": [' + b'{"":1},' * 500_000 + b"0]}", 400),
        (b"application/json", b'{"inputs": ["' + b"x" * 2_000_000 + b'"' + b',"a"' * 400_000 + b"]}", 400),
        (b"application/json", b'{"inputs": []}', 400),
        (b"application/json", b'{"inputs": [[[[NaN]]]]}', 400),
        (b"application/json", b"x" * (4 * 2**20 + 1), 413),
    ],
    ids=["csv", "parquet", "nothing", "empty", "deep", "lists", "objects", "text", "no image", "nan", "large"],
)
def test_a_hostile_request_is_refused_without_reaching_the_model(readers, kind: bytes, body: bytes, status: int):
    reader, _ = readers("request")
    kinds = (b"application/json", b"text/csv", b"application/vnd.apache.parquet", b"")
    before = peak()
    became, said = judge(reader.read, bytes([kinds.index(kind)]) + body)
    assert (became, said) == ("refused", str(status))
    assert peak() - before < 300


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
