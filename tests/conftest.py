"""Small real images and the fixtures that several tests share."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from sklearn.datasets import load_digits

from pipeline.data.dataset import Dataset
from pipeline.data.prepared import Split, TrainingData
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from tests.checkout import ROOT, Checkout, copy_checkout

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
torch.set_num_threads(1)  # as a training, whatever the machine has
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and so would what tests start


DIGITS = Dataset(
    name="digits",
    classes=[str(digit) for digit in range(10)],
    image_shape=(8, 8, 1),
    mean=0.5,
    std=0.5,
    images={"train": 400, "val": 100, "test": 0},
    validation="official",
    fingerprint="0" * 64,
)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` of scikit-learn's 8x8 digits: uint8 (N, 8, 8) and labels (N,)."""
    bunch = load_digits()
    return np.clip(bunch.images[:count] * 16, 0, 255).astype(np.uint8), bunch.target[:count]


def write_npz(path: Path, **replaced: np.ndarray | None) -> Path:
    """An .npz of 400 training, 100 validation and 200 test digits; arrays named here are replaced, None leaves one out."""
    images, labels = digits(700)
    arrays = {
        "train_images": images[:400],
        "train_labels": labels[:400, None],
        "val_images": images[400:500],
        "val_labels": labels[400:500, None],
        "test_images": images[500:],
        "test_labels": labels[500:, None],
    } | replaced
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def prepare_npz(folder: Path, validation: float = 0.1, **replaced: np.ndarray | None) -> Dataset:
    """The set of such a file, prepared in a folder; the file lies beside it."""
    return prepare(read_source(str(write_npz(folder.with_suffix(".npz"), **replaced))), validation, folder)


def is_mapped(address: int) -> bool:
    """Whether memory of this process is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[4] != "0"  # the inode
    raise AssertionError(hex(address))


def small_checkout(folder: Path, **parameters: object) -> Checkout:
    """A copy of the project whose tracks read a small file, two seeds, one epoch or two, unless `parameters` say otherwise."""
    folder.mkdir(parents=True)
    write_npz(folder / "images.npz")
    small = {"baselines__dataset": "images.npz", "distillation__dataset": "images.npz", "baselines__pretrained": False}
    small |= {"baselines__epochs": 1, "distillation__epochs": 2, "seeds": [0, 1]}
    return copy_checkout(folder, **(small | parameters))


def stages_run(output: str) -> list[str]:
    """The stages that DVC says it has run."""
    return re.findall(r"Running stage '(.*)'", output)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "images.npz")


@pytest.fixture(scope="session")
def data() -> TrainingData:
    """400 digits to train on and 100 to validate on, as tensors on the CPU."""
    images, labels = (torch.from_numpy(array) for array in digits(500))
    images = images[..., None]
    return TrainingData(DIGITS, Split(images[:400], labels[:400]), Split(images[400:], labels[400:]))


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite store without runs, to copy: MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def store(tmp_path: Path, new_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The main checkout of a store of one's own, without runs."""
    (tmp_path / "mlflow.db").write_bytes(new_store)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "TRACK_LATER", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder DATA_MIRROR, with the real MNIST and PneumoniaMNIST: what CI has and a fresh machine may not."""
    folder = os.environ.get("DATA_MIRROR")
    if not folder:
        pytest.skip("needs DATA_MIRROR with MNIST/ and pneumoniamnist.npz")
    return (ROOT / folder).resolve()


@pytest.fixture
def no_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No mirror, and a main checkout of one's own."""
    monkeypatch.delenv("DATA_MIRROR", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path
