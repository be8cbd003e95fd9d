"""Damaged and hostile input for every reader: what became of it.

A reader gets a valid input, mutated, as a file or a request, in a process of its own that may not be silent for more than
10 s. It must accept the input or refuse it with a `UserError` (a request: with a 4xx), run nothing that is in it, and need
less than 1 GiB for it.
"""

import asyncio
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import NamedTuple

import mlflow
import numpy as np
import onnx
import torch
import yaml
from mlflow.models import ModelSignature
from mlflow.pyfunc import scoring_server
from mlflow.types import Schema, TensorSpec
from PIL import Image
from safetensors.torch import save

import studies.study
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import read_json
from pipeline.data.dataset import load_dataset
from pipeline.data.prepared import load_split
from pipeline.evaluation.comparisons import FILES, read_evaluation
from pipeline.export.onnx_model import Student
from pipeline.fetching.sources import MNIST_MD5, read_source
from pipeline.networks.checkpoints import load_checkpoint, load_initial_weights, new_classifier, save_checkpoint
from pipeline.networks.description import Description
from pipeline.params import load_params
from pipeline.serving.predict import read_image
from pipeline.serving.registry import read_predictions
from pipeline.serving.server import LIMIT, GuardBody
from pipeline.training.cache import Entry, Record, read_record
from tests.faults import mutations as m
from tests.faults.checkout import ROOT, Outcome

CPU = torch.device("cpu")
CONTEXT = multiprocessing.get_context("spawn")
PATIENCE = 10  # seconds for one input
MEMORY = 1024  # MiB over what the reader has anyway
ADDRESS_SPACE = 8 * 2**30  # bytes more than a process has when it starts: what a bomb meets before the machine does
SIGN = "foreign-code-ran"  # the folder that it would make
GIVEAWAYS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")  # audit events

Mutate = Callable[[Random], bytes]
Read = Callable[[bytes], None]


class Reader(NamedTuple):
    """What reads input, and how to make hostile input for it."""

    seed: bytes
    mutate: Mutate  # besides damage at random
    read: Read

    @classmethod
    def of_file(cls, path: Path, seed: bytes, mutate: Mutate, read: Callable[[Path], object]) -> "Reader":
        """A reader of the file `path`."""

        def write_and_read(content: bytes) -> None:
            path.write_bytes(content)
            read(path)

        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(seed, mutate, write_and_read)

    @classmethod
    def of_json(cls, path: Path, value: dict, read: Callable[[Path], object]) -> "Reader":
        """A reader of a JSON file."""
        return cls.of_file(path, json.dumps(value).encode(), lambda random: m.json_text(value, random), read)

    @classmethod
    def of_yaml(cls, folder: Path, path: Path, source: Path, read: Callable[[Path], object]) -> "Reader":
        """A reader of a YAML file that is valid if it is like `source`."""
        seed, sign = source.read_bytes(), folder / SIGN
        return cls.of_file(path, seed, lambda random: m.yaml_text(yaml.safe_load(seed), random, sign), read)

    @classmethod
    def of_npz(cls, path: Path, arrays: dict[str, bytes], read: Callable[[Path], object]) -> "Reader":
        """A reader of an .npz archive of these .npy files."""
        seed, sign = m.archive(list(arrays.items())), path.parent / SIGN
        return cls.of_file(path, seed, lambda random: m.odd_npz(arrays, random, sign), read)


Make = Callable[[Path], Reader]  # given an empty folder


@dataclass
class Tally:
    """What became of the inputs for one reader."""

    injected: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)  # accepted, refused, crashed, hung, executed
    messages: Counter[str] = field(default_factory=Counter)  # of crashes
    peak: float = 0.0  # MiB over what the process had after a valid input
    slowest: float = 0.0  # seconds

    def add(self, verdict: str, message: str = "", executed: bool = False, peak: float = 0.0, seconds: float = 0.0) -> None:
        """Count one more input."""
        self.injected += 1
        self.verdicts.update([verdict] + ["executed"] * executed)
        self.messages.update([message] if verdict in ("crashed", "hung") else [])
        self.peak, self.slowest = max(self.peak, peak), max(self.slowest, seconds)


def checkpoint(folder: Path) -> Reader:
    """checkpoints.load_checkpoint."""
    path, description = folder / "seed0.safetensors", Description.model_validate(_description())
    network = new_classifier(description.architecture, description.arguments, description.dataset, 0)
    save_checkpoint(path, network, description)
    seed = path.read_bytes()

    def read(path: Path) -> None:
        classifier, loaded = load_checkpoint(path, CPU)
        classifier(torch.zeros((1, *loaded.dataset.image_shape), dtype=torch.uint8))
        loaded.best()

    return Reader.of_file(path, seed, lambda random: m.safetensors_file(seed, random, "description"), read)


def initial_weights(folder: Path) -> Reader:
    """checkpoints.load_initial_weights."""
    seed = save({"conv1.weight": torch.zeros(4, 3, 3, 3), "bn.num": torch.tensor(1)})
    path = folder / "resnet18.safetensors"
    return Reader.of_file(path, seed, lambda random: m.safetensors_file(seed, random, "none"), load_initial_weights)


def own_images(folder: Path) -> Reader:
    """sources.read_source of a user's own file."""
    return Reader.of_npz(folder / "own.npz", _arrays(), lambda path: read_source(str(path)))


def mnist(folder: Path) -> Reader:
    """sources.read_source of MNIST's IDX files in DATA_MIRROR."""
    os.environ["DATA_MIRROR"] = str(folder)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_MD5:
        (raw / name).write_bytes(b"")
    start, images = bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28]), bytes(7840)
    path = raw / "train-images-idx3-ubyte"
    return Reader.of_file(path, start + images, lambda random: m.damage(start, random) + images, lambda _: read_source("mnist"))


def prepared_arrays(folder: Path) -> Reader:
    """prepared.load_split. The first byte says which of the two arrays it is."""
    arrays = _arrays()
    (folder / "train").mkdir()

    def read(content: bytes) -> None:
        changed = "labels" if content[:1] == b"L" else "images"
        for name in ("labels", "images"):
            array = content[1:] if name == changed else arrays[f"train_{name}.npy"]
            (folder / "train" / f"{name}.npy").write_bytes(array)
        load_split(folder, "train", CPU)

    def mutate(random: Random) -> bytes:
        name = random.choice(("labels", "images"))
        return name[:1].upper().encode() + m.odd_array(arrays[f"train_{name}.npy"], random, folder / SIGN)

    return Reader(b"I" + arrays["train_images.npy"], mutate, read)


def prepared_description(folder: Path) -> Reader:
    """dataset.load_dataset."""
    return Reader.of_json(folder / "dataset.json", _dataset(), lambda path: load_dataset(path.parent))


def stage_json(folder: Path) -> Reader:
    """files.read_json."""
    value = {"student": {"accuracy": 0.9, "auc": 0.99}, "seeds": [0, 1, 2]}
    return Reader.of_json(folder / "a.json", value, lambda path: read_json(path).items())


def parameters(folder: Path) -> Reader:
    """params.load_params."""
    return Reader.of_yaml(folder, folder / "params.yaml", ROOT / "params.yaml", load_params)


def study(folder: Path) -> Reader:
    """study.load_study."""
    shutil.copy(ROOT / "params.yaml", folder)
    studies.study.ROOT = folder
    path = folder / "studies" / "a.yaml"
    return Reader.of_yaml(folder, path, ROOT / "studies" / "mnist.yaml", lambda path: studies.study.load_study(path.stem))


def image(folder: Path) -> Reader:
    """predict.read_image."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint32).astype(np.uint8).reshape(28, 28)).save(stream, "PNG")
    seed, read = stream.getvalue(), functools.partial(read_image, shape=(28, 28, 1))
    return Reader.of_file(folder / "a.png", seed, lambda random: m.odd_png(seed, random), read)


def exported_student(folder: Path) -> Reader:
    """onnx_model.Student, and an image through what it opened."""
    seed, blank = _onnx(), np.zeros((1, 8, 8, 1), np.uint8)
    path = folder / "student.onnx"
    return Reader.of_file(path, seed, lambda random: m.damage(seed, random), lambda path: Student(path).probabilities(blank))


def predictions(folder: Path) -> Reader:
    """registry.read_predictions."""
    return Reader.of_npz(folder / "predictions.npz", _predictions(), read_predictions)


def evaluation(folder: Path) -> Reader:
    """comparisons.read_evaluation: its predictions."""
    detail = {"track": "own", "dataset": _dataset(), "models": {"student_distilled": {"seeds": [0, 1]}}}
    tables = dict(zip(FILES, [b"{}", b"{}", json.dumps(detail).encode()], strict=False))
    read = lambda path: read_evaluation("{}", lambda name: tables.get(name) or path.read_bytes())  # noqa: E731
    return Reader.of_npz(folder / "evaluation.npz", _predictions(), read)


def saved_training(folder: Path) -> Reader:
    """cache.Entry.load, which returns None where others refuse."""
    entry, record = Entry(folder, "a"), Record(**_description(), epochs=2)
    entry.save(record, {"model": {"weight": torch.arange(6.0).reshape(2, 3)}})
    seed = entry.state.read_bytes()

    def read(_: Path) -> None:
        loaded = entry.load()
        if loaded is None:
            raise UserError("nothing to resume from")
        if loaded[0] != record or loaded[1]["model"]["weight"].sum() != 15:
            raise AssertionError("something else than was saved")

    return Reader.of_file(entry.state, seed, lambda random: m.damage(seed, random), read)


def training_record(folder: Path) -> Reader:
    """cache.read_record, which returns None where others refuse."""

    def read(_: Path) -> None:
        if read_record(folder, "a") is None:
            raise UserError("no record")

    value = _description() | {"epochs": 2, "started": 1.5, "loads": [{"system/cpu_utilization_percentage": 9.0}]}
    return Reader.of_json(folder / "a" / "record.json", value, read)


def request(folder: Path) -> Reader:
    """The server, by its ASGI application. The first byte stands for the type. A 4xx is a refusal."""
    (folder / "student.onnx").write_bytes(_onnx())
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(ROOT / "pipeline" / "serving" / "pyfunc_model.py"),
        artifacts={"onnx": str(folder / "student.onnx")},
        signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float64), (-1, 8, 8, 1))])),
        pip_requirements=[],
    )
    app = GuardBody(scoring_server.init(mlflow.pyfunc.load_model(str(folder / "model"))), LIMIT, (8, 8, 1))
    loop = asyncio.new_event_loop()
    value = {"inputs": np.zeros((2, 8, 8, 1), int).tolist()}
    image = json.dumps(value["inputs"][0]).encode()
    large = (b"[]", b"[1]", b'{"":1}', b"[[[[[[0]]]]]]", b'""', b"1.5", b"1e9", b"null", b"9" * 4000, b"[" * 500, image)
    frames = ((b'{"inputs": [', b"]}"), (b"[", b"]"), (b'{"dataframe_records": [', b"]}"), (b"", b""))

    def read(content: bytes) -> None:
        kind = CONTENT_TYPES[int.from_bytes(content[:1]) % len(CONTENT_TYPES)]
        status = loop.run_until_complete(_status(app, kind, content[1:]))
        if 400 <= status < 500:
            raise UserError(str(status))
        if status != 200:
            raise AssertionError(f"status {status} for {kind}")

    def mutate(random: Random) -> bytes:
        body = m.json_text(value, random)
        if random.random() < 0.02:
            unit, (start, end) = random.choice(large), random.choice(frames)
            body = start + b",".join([unit] * ((LIMIT - 100) // (len(unit) + 1))) + end
        return bytes([random.choice((0, 0, 0, 0, 1, 2, 3, 4))]) + body

    return Reader(b"\0" + json.dumps(value).encode(), mutate, read)


CONTENT_TYPES = (b"application/json", b"text/csv", b"application/vnd.apache.parquet", b"", b"application/json; charset=x")
MAKERS: tuple[Make, ...] = (
    *(checkpoint, initial_weights, own_images, mnist, prepared_arrays, prepared_description, stage_json, parameters, study),
    *(image, exported_student, predictions, evaluation, saved_training, training_record, request),
)
READERS: dict[str, Make] = {maker.__name__: maker for maker in MAKERS}


def hostile(reader: Reader, random: Random, folder: Path) -> bytes:
    """One input: mutated by what knows the format, damaged blindly, of another kind, or two of these at once."""
    kind = random.random()
    if kind < 0.45:
        return reader.mutate(random)
    if kind < 0.9:
        return m.damage(reader.seed, random)
    if kind < 0.95:
        return m.damage(reader.mutate(random), random)
    return reader.seed[:1] + m.foreign(random, folder / SIGN) if kind < 0.97 else m.foreign(random, folder / SIGN)


def bombard(make: Make, count: int) -> Tally:
    """Give `count` inputs, always the same, to the reader that `make` makes. A process that hangs or dies is replaced."""
    tally = Tally()
    while tally.injected < count:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_child, args=(make, tally.injected, count, theirs, Path(folder)), daemon=True)
            process.start()
            theirs.close()
            try:
                _receive(ours, process, count, tally)
            except EOFError:
                process.join()
                tally.add("crashed", f"input {tally.injected}: the process ended with {process.exitcode}")
            finally:
                process.kill()
                process.join()
    return tally


def _receive(pipe: Connection, process: BaseProcess, count: int, tally: Tally) -> None:
    """Count what a process says of its inputs, until the last or until it hangs. Raises EOFError if it dies."""
    if not pipe.poll(300):
        raise TimeoutError("not ready")
    base = pipe.recv()
    while tally.injected < count:
        if not pipe.poll(PATIENCE):
            tally.add("hung", f"input {tally.injected} hung", peak=_peak_of(process.pid) - base)
            return
        verdict, message, executed, peak, seconds = pipe.recv()
        tally.add(verdict, message, executed, peak - base, seconds)


def _child(make: Make, first: int, count: int, pipe: Connection, folder: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    reader = make(folder)
    with contextlib.suppress(UserError):  # MNIST's own files are not here
        reader.read(reader.seed)
    giveaways: list[str] = []
    sys.addaudithook(lambda event, _: giveaways.append(event) if event in GIVEAWAYS else None)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESS_SPACE,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    pipe.send(_peak_of())
    for number in range(first, count):
        content = hostile(reader, Random(f"{make.__name__} {number}"), folder)
        start = time.perf_counter()
        verdict, message = judge(reader.read, content)
        executed = bool(giveaways) or (folder / SIGN).exists()
        giveaways.clear()
        shutil.rmtree(folder / SIGN, ignore_errors=True)
        pipe.send((verdict, message, executed, _peak_of(), time.perf_counter() - start))


def judge(read: Read, content: bytes) -> tuple[str, str]:
    """What a reader does with an input: "accepted", "refused" or "crashed", and its message."""
    try:
        read(content)
    except UserError as error:
        return "refused", one_line(error)
    except BaseException as error:  # whatever it is
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "pipeline" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return "crashed", f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
    return "accepted", ""


def _peak_of(process: int | str = "self") -> float:
    """MiB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text()).group(1)) / 2**10


def _address_space() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _dataset() -> dict:
    counts = {"images": {"train": 20, "val": 20, "test": 20}, "validation": "official", "fingerprint": "0" * 64}
    return {"name": "digits", "classes": ["a", "b", "c"], "image_shape": [8, 8, 1], "mean": 0.5, "std": 0.5, **counts}


def _description() -> dict:
    epoch = {"train_loss": 0.1, "train_accuracy": 0.9, "val_loss": 0.2, "val_accuracy": 0.8, "terms": {"hard": 0.1}}
    network = {"architecture": "compact_cnn", "arguments": {"width": 2, "hidden": 4}, "device": "cpu"}
    names = {"format": 3, "digest": "0" * 32, "setting": "1" * 32, "model": "teacher", "seed": 0}
    results = {"history": [epoch], "best_epoch": 1, "chance": 0.1}
    return {**names, **network, "dataset": _dataset(), "parameters": {"lr": 0.1}, **results}


def _predictions() -> dict[str, bytes]:
    """The .npy files of predictions."""
    probabilities = np.full((2, 20, 3), 1 / 3, np.float32)
    arrays = {"labels": np.zeros(20, np.int64), "seeds": np.arange(2), "student_distilled": probabilities}
    return {f"{name}.npy": _npy(array) for name, array in arrays.items()}


def _npy(array: np.ndarray) -> bytes:
    return m.array_file(array.dtype.str, array.shape, array.tobytes())


def _arrays() -> dict[str, bytes]:
    """The .npy files of a small set of a user's own."""
    arrays = {"class_names.npy": _npy(np.array(["a", "b", "c"]))}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images.npy"] = _npy(np.full((20, 8, 8, 1), 7, np.uint8))
        arrays[f"{split}_labels.npy"] = _npy(np.arange(20) % 3)
    return arrays


def _onnx() -> bytes:
    """A model like the exported student, with one layer."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
        student (uint8[N, 8, 8, 1] images, float[64, 3] weights) => (float[N, 3] probabilities) {
            pixels = Cast<to = 1>(images)
            flat = Flatten(pixels)
            logits = MatMul(flat, weights)
            probabilities = Softmax(logits)
        }""")
    model.graph.input.pop()
    weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "weights"))
    onnx.helper.set_model_props(model, {"classes": json.dumps(["a", "b", "c"])})
    onnx.checker.check_model(model)
    return model.SerializeToString()


async def _status(app: Callable, kind: bytes, body: bytes) -> int:
    """The status with which an ASGI application answers a request."""
    messages: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "scheme": "http"}
    await app(scope | {"headers": [(b"content-type", kind)] if kind else []}, receive, send)
    return messages[0]["status"]


def hostile_input(count: int, readers: dict[str, Make] | None = None) -> list[Outcome]:
    """Share `count` inputs among the readers; one outcome per reader."""
    readers = readers or READERS
    return [outcome(name, bombard(make, -(-count // len(readers)))) for name, make in readers.items()]


def outcome(name: str, tally: Tally) -> Outcome:
    """The tally of a reader as a row of the table: wrong is what crashed, hung, was executed, or needed 1 GiB."""
    for message, times in tally.messages.most_common():
        print(f"{name}: {times} x {message}")
    counts = tally.verdicts
    harmed = counts["crashed"] + counts["hung"] + counts["executed"] + (tally.peak >= MEMORY)
    figures = f"peak {tally.peak:.0f} MiB, slowest {tally.slowest:.1f} s"
    details = f"{counts['refused']} refused, {counts['accepted']} accepted; {figures}"
    return Outcome(f"hostile input: {name}", tally.injected, tally.injected - harmed, 0, harmed, details)
