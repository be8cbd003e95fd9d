"""What is damaged, malformed or malicious is refused in one line; no code in it is run, no memory taken on its word.

A reader must accept an input or refuse it with a `UserError` (a request: with a 4xx) within 10 s, run no code that is in it, and
need less than 300 MiB for it. The inputs are always the same.
"""

import asyncio
import faulthandler
import functools
import io
import json
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import AsyncMock

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import load, save

from pipeline.core.errors import UserError, one_line
from pipeline.core.files import read_json
from pipeline.data.dataset import SPLITS, Dataset, load_dataset
from pipeline.export.onnx_export import export_onnx
from pipeline.export.onnx_model import open_foreign
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import load_checkpoint, load_initial_weights, new_classifier, save_checkpoint
from pipeline.params import load_params
from pipeline.serving.predict import read_image
from pipeline.serving.registry import read_predictions
from pipeline.serving.server import LIMIT, application
from pipeline.training.cache import Entry, Record, read_record
from studies import study
from tests.checkout import ROOT
from tests.faults.conftest import FULL
from tests.networks.conftest import describe

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]
PATIENCE = 10  # seconds for one input, after which the process ends with a traceback
MEMORY = 300 * 2**20  # bytes for one input
SIGN = "foreign-code-ran"  # the folder that it would make, in the working directory
FOREIGN_CODE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")  # audit events
executed: list[str] = []  # of them, since the last look
OURS = "pipeline.export.onnx_model"  # that tries a file in a process


def _watch(event: str, arguments: tuple) -> None:
    if event in FOREIGN_CODE and OURS not in str(arguments):
        executed.append(event)


sys.addaudithook(_watch)


def npy(dtype: Any = "|u1", shape: Any = (20, 8, 8, 1), data: bytes = b"", header: str = "") -> bytes:
    """An .npy file with this header, true or not."""
    text = (header or repr({"descr": dtype, "fortran_order": False, "shape": shape})).encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


def npz(arrays: dict[str, np.ndarray], **replaced: bytes) -> bytes:
    """An .npz archive of arrays, of which .npy files replace some."""
    entries = {name: npy(array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()} | replaced
    with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file that says it has these sides, with right checksums."""
    chunks = ((b"IHDR", struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)), *chunks)
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


PARTS = {"images": np.full((20, 8, 8, 1), 7, np.uint8), "labels": np.arange(20) % 3}
IMAGES = {f"{split}_{part}": array for split in SPLITS for part, array in PARTS.items()} | {"class_names": np.array([*"abc"])}
PREDICTIONS = {"labels": np.zeros(20, int), "seeds": np.arange(2), "student_distilled": np.full((2, 20, 3), 1 / 3, np.float32)}
COUNTS = {"images": dict.fromkeys(SPLITS, 20), "validation": "official", "fingerprint": "0" * 64}
DATASET = Dataset(name="digits", classes=[*"abc"], image_shape=(8, 8, 1), mean=0.5, std=0.5, **COUNTS)
DESCRIPTION = describe(DATASET)
RECORD = Record(**DESCRIPTION.model_dump(), epochs=2, started=1.5, loads=[{"system/cpu_utilization_percentage": 9.0}])
NETWORK = new_classifier(DESCRIPTION.architecture, DESCRIPTION.arguments, DATASET, 0)
IDAT, IEND = (b"IDAT", zlib.compress(bytes(29 * 28))), (b"IEND", b"")
PICKLE = f"cposix\nmkdir\n(S'{SIGN}'\ntR.".encode()
CODE = f"!!python/object/apply:os.mkdir ['{SIGN}']\n".encode()
POSTSCRIPT = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n({SIGN}) (w) file closefile showpage\n".encode()
LAUGHS = b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n + 1, n + 1, b", ".join([b"*a%d" % n] * 9)) for n in range(20))
MERGES = LAUGHS.replace(b"[x]", b"{x: 1}").replace(b"[", b"{<<: [").replace(b"]", b"]}")

# To be refused, by the readers of what it could be.
YAML = (
    *(LAUGHS, MERGES, b"kd: &a [*a]\n", b"x: " + CODE, CODE, b"\0", b"%YAML 9.9\n---\n", "x: \u2028\x85\ufeff\n".encode()),
    *(b"x: " + b"[" * 5000, b"x: " + b"[" * 100_000, b"x: " + b"{a: " * 5000, b"x: " + b"9" * 5000, b"x: 0x" + b"f" * 50_000),
    *(b"x: " + b"1:" * 20_000 + b"1\n", b"x: 2001-99-99\n", b"x: !!binary '???'\n", b"x: !!set {? [a]}\n", b"? {a: b}\n: c\n"),
    *(b"x: |\n " + b"y" * 2_000_000, b"x: " + b"y" * 90_000, b"- a\n" * 200_000, b"- 1\n- 2", b"--- a\n--- b\n", b"\xff\xfe"),
)
PIXELS = PARTS["images"].tobytes()
SIDES = (0, 1, 19, 21, -1, 2**20, 2**31, 2**40, 2**62, 10**30, True, 1.5, None)
DTYPES = ("<i8", ">i8", "<f8", "<f2", "|b1", "<c16", "<U5", "<U0", "|V0", "|S3", "<M8[ns]", "O", "xx", "", 7, None)
STRUCTURES = ([("a", "<i4"), ("b", "|O")], ("<i4", (2**40,)), [("a", "|V0")])
HEADERS = ("(" * 4000, "(" * 150 + "1" + ")" * 150, "{", "[]", "'" * 9, "{'shape': 1L}", "\0", "9" * 5000)
NPY = (
    *(npy(shape=(side, 8, 8, 1), data=PIXELS) for side in SIDES),
    *(npy(dtype, data=PIXELS) for dtype in DTYPES + STRUCTURES),
    *(npy(header=header, data=PIXELS) for header in HEADERS),
    *(npy("|O", shape, PICKLE) for shape in ((20, 8, 8, 1), (1,), ())),
    *(npy(dtype, shape) for dtype in ("<U0", "|V0", "|u1") for shape in ((2**40,), (2**62, 0, 8))),
    *(npy(data=PIXELS[1:]), npy(data=PIXELS + b"\0"), npy(shape=(19, 8, 8, 1), data=PIXELS[64:]), npy("<U5", data=bytes(25_600))),
)
WRONG_SIDES = ((50_000, 50_000), (10_000, 10_000), (28, 2**31), (2**32 - 1, 2**32 - 1), (0, 28), (8, 8))
PNG = (
    *(png(*sides, IDAT, IEND) for sides in WRONG_SIDES),
    *(b"GIF89a\x1c\0\x1c\0\0\0\0", POSTSCRIPT, png(28, 28, IEND), png(28, 28, (b"IDAT", b"x" * 100), IEND)),
    png(28, 28, (b"IDAT", IDAT[1][:-8]))[:-20],
)
BODIES = (
    *(b"", b'{"inputs": []}', b'{"inputs": [[[[NaN]]]]}', b'{"inputs": [' + b"[[[[[[0]]]]]]," * 250_000 + b"0]}"),
    *(b'{"inputs": [' + b"[]," * 1_000_000 + b"[]]}", b'{"instances": [' + b'{"":1},' * 500_000 + b"0]}", b"[" * 4_000_000),
    *(b'{"inputs": ["' + b"x" * 2_000_000 + b'"' + b',"a"' * 400_000 + b"]}", b'{"inputs": [' + b"1e9," * 1_000_000 + b"0]}"),
    *(b'{"dataframe_records": [' + b'"",' * 1_000_000 + b'""]}', b'{"inputs": [' + b"9" * 4_000_000 + b"]}", b" " * (LIMIT + 1)),
)
TYPES = (b"text/csv\na,b\n1,2", b"application/vnd.apache.parquet\nPAR1", b"\n", b"application/json; charset=x\n")
ARGUMENTS = ({"width": 4096, "hidden": 65_536}, {"hidden": 10**12}, {"width": 10**30}, {"name": "resnet18"})
DATASETS = ({"image_shape": [60_000, 60_000, 1]}, {"image_shape": [10**12, 8, 1]}, {"classes": ["x"] * 200_000}, {"std": 0})
UNKNOWN_TYPE = b'\x35\0\0\0\0\0\0\0{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}abcd'

# Instead of a part of a valid file.
NUMBERS = tuple((2**bits % 256**size).to_bytes(size, "little") for bits in (0, 7, 15, 31, 62, 64) for size in (1, 2, 4, 8))
JSON_PARTS = re.compile(rb'"[^"]*"|-?[\d.]+|\[[^\[\]]*\]|\{[^{}]*\}')  # keys, values, innermost lists and objects
JSON = (
    *(b"null", b"true", b"-1", b"0", b"65536", b"2147483648", b"0.5", b"1e308", b"1e999", b"NaN", b"9" * 400, b"9" * 5000, b""),
    *(b'""', b'"' + b"x" * 10_000 + b'"', b'"../../../etc/passwd"', b'"\\u0000\\u001b[2J"', b'"F4"', b'"BF16"', b'"__class__"'),
    *(b"[]", b"{}", b"[{}]", b'{"": {}}', b'0, "extra": 0', b'0, "in_channels": 0', b"[" + b"[]," * 999 + b"0]"),
    *(b"[" * 50_000, b"[" * 50_000 + b"]" * 50_000),
)
KINDS = (b"zTXt", b"iCCP", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"eXIf")
CHUNKS = tuple(png(28, 28, (kind, b"a\0\0\1\0\0\0"), IDAT, IEND) for kind in KINDS)
FOREIGN = (*YAML, *JSON, *NPY, *PNG, *CHUNKS, b"\x93NUMPY\1\0", b"PK\5\6" + bytes(18), PICKLE)


def edited(content: bytes, places: SearchStrategy[tuple[int, int]], instead: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """`content` with something else at one to three places (start, end)."""

    def edit(edits: list[tuple[tuple[int, int], bytes]]) -> bytes:
        last_first = sorted(edits, key=lambda edit: edit[0], reverse=True)
        return functools.reduce(lambda text, edit: text[: edit[0][0]] + edit[1] + text[edit[0][1] :], last_first, content)

    return st.lists(st.tuples(places, instead), min_size=1, max_size=3).map(edit)


def damaged(content: bytes) -> SearchStrategy[bytes]:
    """`content`, overwritten, cut out, repeated or cut off at one to three places."""
    at, sizes = st.integers(0, len(content)), st.sampled_from((0, 1, 2, 4, 8, 64, 4096))
    instead = st.sampled_from(NUMBERS) | st.binary(max_size=64) | at.map(lambda start: content[start : start + 64] * 100)
    places = st.tuples(at, sizes).map(lambda place: (place[0], sum(place)))
    return edited(content, places, instead) | at.map(lambda end: content[:end])


def other_json(content: bytes) -> SearchStrategy[bytes]:
    """JSON with one to three other values, keys, lists or objects."""
    places = [match.span() for match in JSON_PARTS.finditer(content)]
    return edited(content, st.sampled_from(places), st.sampled_from(JSON))


class Reader(NamedTuple):
    """A file, its content if all is well, the function that reads it, and contents that it must refuse."""

    path: Path
    valid: bytes
    read: Callable[[Path], object]
    malformed: Sequence[bytes] = ()

    def contents(self) -> SearchStrategy[bytes]:
        """The valid file, damaged or with other values; or a malformed one, also of another kind, as it is or damaged."""
        others = st.sampled_from((*self.malformed, *FOREIGN))
        changed = [damaged(self.valid), others, others.flatmap(damaged)]
        match self.path.suffix:
            case ".json" | ".http":
                changed.append(other_json(self.valid))
            case ".yaml":
                changed.append(other_json(json.dumps(yaml.safe_load(self.valid)).encode()))
            case ".safetensors":
                described = other_json(DESCRIPTION.model_dump_json().encode())
                changed.append(described.map(lambda text: save(load(self.valid), {"description": text.decode()})))
        return st.one_of(changed)

    def refusal(self, content: bytes) -> str | None:
        """The message that refuses a file of this content, None if it is accepted. Fails if reading it does harm."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(content)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        before = _peak_memory()
        executed.clear()
        try:
            message = None if self.read(self.path) is not None else ""  # some refuse without a word
        except UserError as error:
            message = one_line(error)
        assert _peak_memory() - before < MEMORY
        assert not executed
        assert not Path(SIGN).exists()
        return message


def _peak_memory() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def own_images(folder: Path) -> Reader:
    valid = npz(IMAGES)
    entry = valid.index(b"PK\1\2")
    declared = [valid[: entry + at] + b"\x63\0" + valid[entry + at + 2 :] for at in (8, 10, 16, 24, 42)]  # flags, method, ...
    flipped, missing = valid[:100] + bytes([valid[100] ^ 1]) + valid[101:], npz(PARTS)
    wrong = [npz(IMAGES, train_images=array) for array in NPY]
    return Reader(folder / "own.npz", valid, lambda path: read_source(str(path)), [flipped, missing, *declared, *wrong])


def checkpoint(folder: Path) -> Reader:
    def read(path: Path) -> object:
        classifier, loaded = load_checkpoint(path, torch.device("cpu"))
        return classifier(torch.zeros((1, *loaded.dataset.image_shape), dtype=torch.uint8)), loaded.best()

    def described(tensors: dict, key: str = "dataset", **changed: object) -> bytes:
        description = DESCRIPTION.model_dump()
        return save(tensors, {"description": json.dumps(description | {key: description[key] | changed})})

    save_checkpoint(path := folder / "seed0.safetensors", NETWORK, DESCRIPTION)
    tensors = load(path.read_bytes())
    doubled = described({name: tensor.double() for name, tensor in tensors.items()})
    others = [described(tensors, "arguments", **a) for a in ARGUMENTS] + [described(tensors, **d) for d in DATASETS]
    return Reader(path, path.read_bytes(), read, [doubled, *others])


def saved_training(folder: Path) -> Reader:
    entry = Entry(folder, RECORD.digest)
    entry.save(RECORD, {"weight": torch.arange(6.0)})

    def read(_: Path) -> object:
        loaded = entry.load()
        assert loaded is None or (loaded[0], loaded[1]["weight"].tolist()) == (RECORD, [0, 1, 2, 3, 4, 5])
        return loaded

    return Reader(entry.state, entry.state.read_bytes(), read)


def study_grid(folder: Path) -> Reader:
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    content = (ROOT / "studies/mnist.yaml").read_bytes()
    return Reader(folder / "studies/a.yaml", content, lambda path: study.load_study(path.stem), YAML)


def exported_student(folder: Path) -> Reader:
    path = folder / "student" / "student.onnx"
    export_onnx(NETWORK, DATASET.image_shape, DATASET.classes, path)
    outside, endless = onnx.load(path), onnx.load(path)
    weights = outside.graph.initializer[0]  # in another file, which is there
    (folder / "weights").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, "../weights")
    weights.ClearField("raw_data")
    endless.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["x"], body=onnx.GraphProto(name="forever")))
    malformed = [b"", b"\xff" * 100, outside.SerializeToString(), endless.SerializeToString()]
    return Reader(path, path.read_bytes(), lambda path: open_foreign(path).probabilities(PARTS["images"]), malformed)


def request_body(folder: Path) -> Reader:
    """The server, by its ASGI application. The file's first line is the content type, the rest the body."""
    app = application(open_foreign(exported_student(folder).path))
    scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "scheme": "http"}

    def read(path: Path) -> int:
        kind, _, body = path.read_bytes().partition(b"\n")
        send, receive = AsyncMock(), AsyncMock(return_value={"type": "http.request", "body": body})
        asyncio.run(app(scope | {"headers": [(b"content-type", kind)] if kind else []}, receive, send))
        status = send.await_args_list[0].args[0]["status"]
        if 400 <= status < 500:
            raise UserError(f"a.http: {status}")
        assert status == 200
        return status

    valid = b"application/json\n" + json.dumps({"inputs": np.zeros((2, 8, 8, 1), int).tolist()}).encode()
    return Reader(folder / "a.http", valid, read, [*TYPES, *(b"application/json\n" + body for body in BODIES)])


def training_record(folder: Path) -> Reader:
    valid, path = RECORD.model_dump_json().encode(), folder / RECORD.digest / "record.json"
    return Reader(path, valid, lambda _: read_record(folder, RECORD.digest))


def predictions(folder: Path) -> Reader:
    wrong = [npz(PREDICTIONS, student_distilled=array) for array in NPY]
    return Reader(folder / "a.npz", npz(PREDICTIONS), lambda path: read_predictions(path, "student_distilled"), wrong)


def _of(name: str, valid: bytes, read: Callable[[Path], object], malformed: Sequence[bytes] = ()) -> Callable[[Path], Reader]:
    return lambda folder: Reader(folder / name, valid, read, malformed)


MAKERS = (own_images, checkpoint, saved_training, study_grid, exported_student, request_body, training_record, predictions)
READERS: dict[str, Callable[[Path], Reader]] = {maker.__name__: maker for maker in MAKERS} | {  # given an empty folder
    "prepared_description": _of("dataset.json", DATASET.model_dump_json().encode(), lambda path: load_dataset(path.parent)),
    "initial_weights": _of("resnet18.safetensors", save({"weight": torch.zeros(4, 3)}), load_initial_weights, [UNKNOWN_TYPE]),
    "stage_json": _of("a.json", b'{"a": {"b": 0.9}, "seeds": [0, 1]}', read_json, [b"[1, 2]", b"[" * 100_000, b"\xff", b""]),
    "parameters": _of("params.yaml", (ROOT / "params.yaml").read_bytes(), load_params, YAML),
    "image": _of("a.png", png(28, 28, IDAT, IEND), lambda path: read_image(path, (28, 28, 1)), PNG),
}
COUNT = -(-10_000 // len(READERS)) if FULL else 10


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "ROOT", folder := tmp_path_factory.mktemp(request.param))
        yield READERS[request.param](folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_valid_file_is_accepted_and_malformed_ones_are_refused_in_one_line(reader: Reader, recwarn):
    assert reader.refusal(reader.valid) is None
    recwarn.clear()
    for number, content in enumerate(reader.malformed):
        assert reader.path.stem in (reader.refusal(content) or ""), f"{number}: {content[:200]}"
    assert reader.path.suffix == ".npz" or not recwarn.list, "one line"  # NumPy warns of some headers


def test_no_input_harms_a_reader(reader: Reader, outcome, request: pytest.FixtureRequest):
    outcome.fault = f"malformed input: {request.node.callspec.params['reader']}"
    reader.refusal(reader.valid)

    @settings(max_examples=COUNT, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(reader.contents())
    def feed(content: bytes) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
        outcome.injected, outcome.wrong = outcome.injected + 1, outcome.wrong + 1
        reader.refusal(content)
        outcome.wrong -= 1
        faulthandler.cancel_dump_traceback_later()

    feed()


HARM = {
    "crashes": lambda: {}["missing"],
    "takes 400 MiB": lambda: b"x" * 400 * 2**20,
    "runs a command": lambda: os.system("true"),
    "unpickles": lambda: np.load(io.BytesIO(npy("|O", (1,), PICKLE)), allow_pickle=True),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_noticed(tmp_path: Path, harm: str):
    with pytest.raises(KeyError if harm == "crashes" else AssertionError):
        Reader(tmp_path / "a", b"", lambda _: HARM[harm]()).refusal(b"x")
