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
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import AsyncMock

import numpy as np
import onnx
import pytest
import torch
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
from pipeline.serving.server import application
from pipeline.training.cache import Entry, Record, read_record
from studies import study
from tests.checkout import ROOT
from tests.faults.conftest import FULL
from tests.hostile import DESCRIPTIONS, FOREIGN, JSON, NPY, PICKLE, PNG, REQUESTS, SIGN, UNKNOWN_TYPE, VALID_PNG, YAML, npy, npz
from tests.networks.conftest import describe

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]
PATIENCE = 10  # seconds for one input, after which the process ends with a traceback
MEMORY = 300 * 2**20  # bytes for one input
FOREIGN_CODE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")  # audit events
executed: list[str] = []  # of them, since the last look
OURS = "pipeline.export.onnx_model"  # that tries a file in a process
sys.addaudithook(lambda event, about: executed.append(event) if event in FOREIGN_CODE and OURS not in str(about) else None)

PARTS = {"images": np.full((20, 8, 8, 1), 7, np.uint8), "labels": np.arange(20) % 3}
IMAGES = {f"{split}_{part}": array for split in SPLITS for part, array in PARTS.items()} | {"class_names": np.array([*"abc"])}
PREDICTIONS = {"labels": np.zeros(20, int), "seeds": np.arange(2), "student_distilled": np.full((2, 20, 3), 1 / 3, np.float32)}
COUNTS = {"images": dict.fromkeys(SPLITS, 20), "validation": "official", "fingerprint": "0" * 64}
DATASET = Dataset(name="digits", classes=[*"abc"], image_shape=(8, 8, 1), mean=0.5, std=0.5, **COUNTS)
DESCRIPTION = describe(DATASET)
RECORD = Record(**DESCRIPTION.model_dump(), epochs=2, started=1.5, loads=[{"system/cpu_utilization_percentage": 9.0}])
DIGEST = RECORD.digest
PARAMETERS, GRID = (ROOT / "params.yaml").read_bytes(), (ROOT / "studies/mnist.yaml").read_bytes()
NETWORK = new_classifier(DESCRIPTION.architecture, DESCRIPTION.arguments, DATASET, 0)

# Instead of a part of a valid file.
NUMBERS = tuple((2**bits % 256**size).to_bytes(size, "little") for bits in (0, 7, 15, 31, 62, 64) for size in (1, 2, 4, 8))
JSON_PARTS = re.compile(rb'"[^"]*"|-?[\d.]+|\[[^\[\]]*\]|\{[^{}]*\}')  # keys, values, innermost lists and objects


def damaged(content: bytes) -> SearchStrategy[bytes]:
    """`content`, overwritten, cut out or repeated at a place, or cut off there."""
    at, sizes = st.integers(0, len(content)), st.sampled_from((0, 1, 2, 4, 8, 64, 4096))
    instead = st.sampled_from(NUMBERS) | st.binary(max_size=64) | at.map(lambda start: content[start : start + 64] * 100)
    edits = st.tuples(at, sizes, instead)
    return edits.map(lambda edit: content[: edit[0]] + edit[2] + content[sum(edit[:2]) :]) | at.map(lambda end: content[:end])


def other_json(content: bytes) -> SearchStrategy[bytes]:
    """JSON with another value, key, list or object."""
    places = st.sampled_from([match.span() for match in JSON_PARTS.finditer(content)])
    edits = st.tuples(places, st.sampled_from(JSON))
    return edits.map(lambda edit: content[: edit[0][0]] + edit[1] + content[edit[0][1] :])


class Reader(NamedTuple):
    """A file in the working directory, its content if all is well, the function that reads it, and contents to be refused."""

    path: Path
    valid: bytes
    read: Callable[[Path], object]
    malformed: Sequence[bytes] = ()

    def contents(self) -> SearchStrategy[bytes]:
        """The valid file, damaged or with other values; or a malformed one, also of another kind, as it is or damaged."""
        others = st.sampled_from((*self.malformed, *FOREIGN))
        changed = [damaged(self.valid), damaged(self.valid).flatmap(damaged), others, others.flatmap(damaged)]
        if self.path.suffix in (".json", ".http", ".yaml"):
            changed.append(other_json(self.valid))
        elif self.path.suffix == ".safetensors":
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


def own_images() -> Reader:
    valid = npz(IMAGES)
    entry = valid.index(b"PK\1\2")
    declared = [valid[: entry + at] + b"\x63\0" + valid[entry + at + 2 :] for at in (8, 10, 16, 24, 42)]  # flags, method, ...
    flipped, missing = valid[:100] + bytes([valid[100] ^ 1]) + valid[101:], npz(PARTS)
    malformed = [flipped, missing, *declared, *(npz(IMAGES, train_images=array) for array in NPY)]
    return Reader(Path("own.npz"), valid, lambda path: read_source(str(path.absolute())), malformed)


def checkpoint() -> Reader:
    def read(path: Path) -> object:
        classifier, loaded = load_checkpoint(path, torch.device("cpu"))
        return classifier(torch.zeros((1, *loaded.dataset.image_shape), dtype=torch.uint8)), loaded.best()

    save_checkpoint(path := Path("seed0.safetensors"), NETWORK, DESCRIPTION)
    tensors, described = load(path.read_bytes()), DESCRIPTION.model_dump()
    wrong = [(tensors, described | {part: described[part] | other}) for part, other in DESCRIPTIONS]
    wrong.append(({name: tensor.double() for name, tensor in tensors.items()}, described))
    malformed = [save(weights, {"description": json.dumps(description)}) for weights, description in wrong]
    return Reader(path, path.read_bytes(), read, malformed)


def saved_training() -> Reader:
    entry = Entry(Path(), DIGEST)
    entry.save(RECORD, {"weight": torch.arange(6.0)})

    def read(_: Path) -> object:
        loaded = entry.load()
        assert loaded is None or (loaded[0], loaded[1]["weight"].tolist()) == (RECORD, [0, 1, 2, 3, 4, 5])
        return loaded

    return Reader(entry.state, entry.state.read_bytes(), read)


def exported_student() -> Reader:
    export_onnx(NETWORK, DATASET.image_shape, DATASET.classes, path := Path("student/student.onnx"))
    outside = onnx.load(path)
    weights = outside.graph.initializer[0]  # in another file, which is there
    Path("weights").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, "../weights")
    weights.ClearField("raw_data")
    malformed = [b"", b"\xff" * 100, outside.SerializeToString()]
    return Reader(path, path.read_bytes(), lambda path: open_foreign(path).probabilities(PARTS["images"]), malformed)


def request_body() -> Reader:
    """The server, by its ASGI application. The file's first line is the content type, the rest the body."""
    app = application(open_foreign(exported_student().path))
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
    return Reader(Path("a.http"), valid, read, REQUESTS)


read_student = functools.partial(read_predictions, model="student_distilled")
MAKERS = (own_images, checkpoint, saved_training, exported_student, request_body)
READERS: dict[str, Callable[[], Reader]] = {maker.__name__: maker for maker in MAKERS} | {
    name: functools.partial(Reader, Path(file), *content)
    for name, file, *content in (
        ("predictions", "a.npz", npz(PREDICTIONS), read_student, [npz(PREDICTIONS, student_distilled=array) for array in NPY]),
        ("prepared_description", "dataset.json", DATASET.model_dump_json().encode(), lambda path: load_dataset(path.parent)),
        ("training_record", f"{DIGEST}/record.json", RECORD.model_dump_json().encode(), lambda _: read_record(Path(), DIGEST)),
        ("initial_weights", "a.safetensors", save({"weight": torch.zeros(4, 3)}), load_initial_weights, [UNKNOWN_TYPE]),
        ("stage_json", "a.json", b'{"a": {"b": 0.9}, "seeds": [0, 1]}', read_json, [b"[1, 2]", b"[" * 100_000, b"\xff", b""]),
        ("parameters", "params.yaml", PARAMETERS, load_params, YAML),
        ("study_grid", "studies/a.yaml", GRID, lambda path: study.load_study(path.stem), YAML),
        ("image", "a.png", VALID_PNG, lambda path: read_image(path, (28, 28, 1)), PNG),
    )
}
COUNT = -(-10_000 // len(READERS)) if FULL else 10


@pytest.fixture(scope="module", params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp(request.param))
        patch.setattr(study, "ROOT", folder)
        Path("params.yaml").write_bytes(PARAMETERS)
        yield READERS[request.param]()


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
def test_harm_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError if harm == "crashes" else AssertionError):
        Reader(Path("a"), b"", lambda _: HARM[harm]()).refusal(b"x")
