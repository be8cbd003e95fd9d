"""Damaged and hostile input for every reader: what became of it.

A reader gets a valid input, mutated, as a file or a request, in a process of its own that may not be silent for more than
10 s. It must accept the input or refuse it with a `UserError` (a request: with a 4xx), run nothing that is in it, and need
less than 1 GiB for it.
"""

import asyncio
import contextlib
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
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from faults import mutations as m
from faults.outcome import Outcome
from pipeline.core.errors import UserError, one_line

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


Make = Callable[[Path], Reader]  # given an empty folder


@dataclass
class Tally:
    """What became of the inputs for one reader."""

    injected: int = 0
    accepted: int = 0
    refused: int = 0
    crashed: int = 0
    hung: int = 0
    executed: int = 0
    peak: float = 0.0  # MiB over what the process had after a valid input
    slowest: float = 0.0  # seconds
    crashes: Counter[str] = field(default_factory=Counter)


def checkpoint(folder: Path) -> Reader:
    """checkpoints.load_checkpoint."""
    import torch

    from pipeline.networks.description import Description, Epoch
from pipeline.networks.checkpoints import load_checkpoint, new_classifier, save_checkpoint
    from pipeline.data.dataset import Dataset

    path, arguments = folder / "seed0.safetensors", {"width": 2, "hidden": 4}
    dataset = Dataset.model_validate(_dataset())
    epoch = Epoch(train_loss=0.1, train_accuracy=0.9, val_loss=0.2, val_accuracy=0.8)
    description = Description(
        format=2,
        model="teacher",
        architecture="compact_cnn",
        arguments=arguments,
        dataset=dataset,
        seed=0,
        parameters={"lr": 0.1},
        history=[epoch],
        best_epoch=1,
        chance=0.1,
    )
    save_checkpoint(path, new_classifier("compact_cnn", arguments, dataset, 0), description)
    seed = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        classifier, loaded = load_checkpoint(path, torch.device("cpu"))
        classifier(torch.zeros((1, *loaded.dataset.image_shape), dtype=torch.uint8))
        loaded.best()

    return Reader(seed, lambda random: m.safetensors_file(seed, random, "description"), read)


def initial_weights(folder: Path) -> Reader:
    """prepared.load_initial_weights."""
    import torch
    from safetensors.torch import save

    from pipeline.data.prepared import load_initial_weights

    seed = save({"conv1.weight": torch.zeros(4, 3, 3, 3), "bn.num": torch.tensor(1)})
    path = folder / "initial" / "resnet18.safetensors"
    path.parent.mkdir()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_initial_weights(folder, "resnet18")

    return Reader(seed, lambda random: m.safetensors_file(seed, random, "none"), read)


def own_images(folder: Path) -> Reader:
    """sources.read_source of a user's own file."""
    from pipeline.fetching.sources import read_source

    arrays = _arrays()
    seed = m.archive(list(arrays.items()))
    path = folder / "own.npz"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_source(str(path))

    return Reader(seed, lambda random: m.odd_npz(arrays, random, folder / SIGN), read)


def mnist(folder: Path) -> Reader:
    """sources.read_source of MNIST's IDX files in DATA_MIRROR."""
    from pipeline.fetching.sources import MNIST_MD5, read_source

    os.environ["DATA_MIRROR"] = str(folder)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_MD5:
        (raw / name).write_bytes(b"")
    seed = bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(7840)

    def read(content: bytes) -> None:
        (raw / "train-images-idx3-ubyte").write_bytes(content)
        read_source("mnist")

    return Reader(seed, lambda random: m.damage(seed[:16], random) + seed[16:], read)


def prepared_arrays(folder: Path) -> Reader:
    """prepared.load_split."""
    import torch

    from pipeline.data.prepared import load_split

    arrays = _arrays()
    (folder / "train").mkdir()

    def read(content: bytes) -> None:
        name = "labels" if content[:1] == b"L" else "images"
        for other in ("labels", "images"):
            (folder / "train" / f"{other}.npy").write_bytes(arrays[f"train_{other}.npy"])
        (folder / "train" / f"{name}.npy").write_bytes(content[1:])
        load_split(folder, "train", torch.device("cpu"))

    def mutate(random: Random) -> bytes:
        name = random.choice(("labels", "images"))
        return name[:1].upper().encode() + m.odd_array(arrays[f"train_{name}.npy"], random, folder / SIGN)

    return Reader(b"I" + arrays["train_images.npy"], mutate, read)


def prepared_description(folder: Path) -> Reader:
    """prepared.load_dataset."""
    from pipeline.data.dataset import load_dataset

    def read(content: bytes) -> None:
        (folder / "dataset.json").write_bytes(content)
        load_dataset(folder)

    return Reader(json.dumps(_dataset()).encode(), lambda random: m.json_text(_dataset(), random), read)


def stage_json(folder: Path) -> Reader:
    """files.read_json."""
    from pipeline.core.files import read_json

    value = {"student": {"accuracy": 0.9, "auc": 0.99}, "seeds": [0, 1, 2]}

    def read(content: bytes) -> None:
        (folder / "a.json").write_bytes(content)
        assert isinstance(read_json(folder / "a.json"), dict)

    return Reader(json.dumps(value).encode(), lambda random: m.json_text(value, random), read)


def parameters(folder: Path) -> Reader:
    """params.load_params."""
    import yaml

    from pipeline.params import load_params

    path = folder / "params.yaml"
    seed = (Path(__file__).parents[1] / "params.yaml").read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        load_params(path)

    return Reader(seed, lambda random: m.yaml_text(yaml.safe_load(seed), random, folder / SIGN), read)


def study(folder: Path) -> Reader:
    """study.load_study."""
    import yaml

    from studies import study as module

    seed = (module.ROOT / "studies" / "mnist.yaml").read_bytes()
    shutil.copy(module.ROOT / "params.yaml", folder)
    module.ROOT = folder
    (folder / "studies").mkdir()

    def read(content: bytes) -> None:
        (folder / "studies" / "a.yaml").write_bytes(content)
        module.load_study("a")

    return Reader(seed, lambda random: m.yaml_text(yaml.safe_load(seed), random, folder / SIGN), read)


def image(folder: Path) -> Reader:
    """score_images.read_image."""
    import io

    from PIL import Image

    from pipeline.serving.predict import read_image

    stream = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint32).astype(np.uint8).reshape(28, 28)).save(stream, "PNG")
    seed, path = stream.getvalue(), folder / "a.png"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_image(path, (28, 28, 1))

    return Reader(seed, lambda random: m.odd_png(seed, random), read)


def exported_student(folder: Path) -> Reader:
    """exported.Student, and an image through what it opened."""
    from pipeline.export.onnx_model import Student

    seed, path = _onnx(), folder / "student.onnx"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        Student(path).probabilities(np.zeros((1, 8, 8, 1), np.uint8))

    return Reader(seed, lambda random: m.damage(seed, random), read)


def predictions(folder: Path) -> Reader:
    """registry.read_predictions."""
    from pipeline.serving.registry import read_predictions

    values = {"labels": np.zeros(20, np.int64), "seeds": np.arange(2), "student_distilled": np.ones((2, 20), np.int16)}
    arrays = {f"{name}.npy": _npy(value) for name, value in values.items()}
    path = folder / "predictions.npz"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_predictions(path)

    seed = m.archive(list(arrays.items()))
    return Reader(seed, lambda random: m.odd_npz(arrays, random, folder / SIGN), read)


def progress(folder: Path) -> Reader:
    """progress.File, which says None where others refuse."""
    import torch

    from pipeline.training.cache import File, Unfinished

    file = File(folder / "a.safetensors")
    tensors, facts = {"weight": torch.arange(6.0).reshape(2, 3)}, {"history": [{"val_loss": 1.0}], "best_epoch": 1}
    file.save(Unfinished(tensors, facts))
    seed = file.path.read_bytes()

    def read(content: bytes) -> None:
        file.path.write_bytes(content)
        found = file.load()
        if found is None:
            raise UserError("nothing to go on with")
        if found.facts != facts or not torch.equal(found.tensors["weight"], tensors["weight"]):
            raise AssertionError("something else than was saved")

    return Reader(seed, lambda random: m.damage(seed, random), read)


def request(folder: Path) -> Reader:
    """The server, by its ASGI application. A 4xx is a refusal."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import scoring_server
    from mlflow.types import Schema, TensorSpec

    from pipeline import served_student
    from pipeline.serving.server import LIMIT, GuardBody

    (folder / "student.onnx").write_bytes(_onnx())
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=served_student.__file__,
        artifacts={"onnx": str(folder / "student.onnx")},
        signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float64), (-1, 8, 8, 1))])),
        pip_requirements=[],
    )
    app = GuardBody(scoring_server.init(mlflow.pyfunc.load_model(str(folder / "model"))), LIMIT, (8, 8, 1))
    loop = asyncio.new_event_loop()
    value = {"inputs": np.zeros((2, 8, 8, 1), int).tolist()}
    kinds = (b"application/json", b"text/csv", b"application/vnd.apache.parquet", b"", b"application/json; charset=x")
    image = json.dumps(value["inputs"][0]).encode()
    large = (b"[]", b"[1]", b'{"":1}', b"[[[[[[0]]]]]]", b'""', b"1.5", b"1e9", b"null", b"9" * 4000, b"[" * 500, image)

    def read(content: bytes) -> None:
        number, body = int.from_bytes(content[:1]) % len(kinds), content[1:]
        status = loop.run_until_complete(_status(app, kinds[number], body))
        if 400 <= status < 500:
            raise UserError(str(status))
        if status != 200:
            raise AssertionError(f"status {status} for {kinds[number]}")

    def mutate(random: Random) -> bytes:
        body = m.json_text(value, random)
        if random.random() < 0.02:
            unit = random.choice(large)
            start, end = random.choice(
                ((b'{"inputs": [', b"]}"), (b"[", b"]"), (b'{"dataframe_records": [', b"]}"), (b"", b""))
            )
            body = start + b",".join([unit] * ((LIMIT - 100) // (len(unit) + 1))) + end
        return bytes([random.choice((0, 0, 0, 0, 1, 2, 3, 4))]) + body

    return Reader(b"\0" + json.dumps(value).encode(), mutate, read)


READERS: dict[str, Make] = {
    reader.__name__: reader
    for reader in (
        checkpoint,
        initial_weights,
        own_images,
        mnist,
        prepared_arrays,
        prepared_description,
        stage_json,
        parameters,
        study,
        image,
        exported_student,
        predictions,
        progress,
        request,
    )
}


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
    """Give `count` inputs to the reader that `make` makes; the n-th is the same each time."""
    tally = Tally()
    while tally.injected < count:
        _one_process(make, count, tally)
    return tally


def _one_process(make: Make, count: int, tally: Tally) -> None:
    """Go on from where `tally` is, until the end or until the process hangs or dies."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(make, tally.injected, count, theirs, Path(folder)), daemon=True)
        process.start()
        theirs.close()
        try:
            if not ours.poll(300):
                raise TimeoutError(f"{make.__name__}: not ready")
            base = ours.recv()
            while tally.injected < count:
                if not ours.poll(PATIENCE):
                    tally.hung += 1
                    tally.peak = max(tally.peak, _peak_of(process.pid) - base)
                    tally.crashes[f"input {tally.injected} hung"] += 1
                    tally.injected += 1
                    return
                outcome, said, executed, peak, seconds = ours.recv()
                tally.injected += 1
                tally.executed += executed
                tally.peak, tally.slowest = max(tally.peak, peak - base), max(tally.slowest, seconds)
                setattr(tally, outcome, getattr(tally, outcome) + 1)
                if outcome == "crashed":
                    tally.crashes[said] += 1
        except EOFError:
            process.join()
            tally.crashed += 1
            tally.crashes[f"input {tally.injected}: the process ended with {process.exitcode}"] += 1
            tally.injected += 1
        finally:
            process.kill()
            process.join()


def _child(make: Make, first: int, count: int, pipe: Connection, folder: Path) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    reader = make(folder)
    with contextlib.suppress(UserError):  # MNIST's own files are not here
        reader.read(reader.seed)
    seen: list[str] = []
    sys.addaudithook(lambda event, _: seen.append(event) if event in GIVEAWAYS else None)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ADDRESS_SPACE,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    base = _peak_of()
    pipe.send(base)
    for number in range(first, count):
        content = hostile(reader, Random(f"{make.__name__} {number}"), folder)
        start = time.perf_counter()
        outcome, said = judge(reader.read, content)
        executed = bool(seen) or (folder / SIGN).exists()
        seen.clear()
        shutil.rmtree(folder / SIGN, ignore_errors=True)
        pipe.send((outcome, said, executed, _peak_of(), time.perf_counter() - start))


def judge(read: Read, content: bytes) -> tuple[str, str]:
    """What a reader does with an input: "accepted", "refused" or "crashed", and how it said so."""
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
    return {
        "name": "digits",
        "classes": ["a", "b", "c"],
        "image_shape": [8, 8, 1],
        "mean": 0.5,
        "std": 0.5,
        "images": {"train": 20, "val": 20, "test": 20},
        "validation": "official",
        "fingerprint": "0" * 64,
    }


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
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 1])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"classes": json.dumps(["a", "b", "c"])})
    onnx.checker.check_model(model)
    return model.SerializeToString()


async def _status(app: Callable, kind: bytes, body: bytes) -> int:
    """The status with which an ASGI application answers a request."""
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/invocations",
        "raw_path": b"/invocations",
        "query_string": b"",
        "headers": [(b"content-type", kind)] if kind else [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return sent[0]["status"]


def hostile_input(count: int, readers: dict[str, Make] | None = None) -> list[Outcome]:
    """Share `count` inputs among the readers; one outcome per reader."""
    readers = readers or READERS
    return [outcome(name, bombard(make, -(-count // len(readers)))) for name, make in readers.items()]


def outcome(name: str, tally: Tally) -> Outcome:
    """The tally of a reader as a row of the table: wrong is what crashed, hung, was executed, or needed 1 GiB."""
    for said, times in tally.crashes.most_common():
        print(f"{name}: {times} x {said}")
    harmed = tally.crashed + tally.hung + tally.executed + (tally.peak >= MEMORY)
    told = (
        f"{tally.refused} refused, {tally.accepted} accepted; peak {tally.peak:.0f} MiB, slowest {tally.slowest:.1f} s"
    )
    return Outcome(f"hostile input: {name}", tally.injected, tally.injected - harmed, 0, harmed, told)
