"""Turn a source into prepared data."""

import hashlib
import math
from pathlib import Path

import numpy as np

from pipeline.data.dataset import SPLITS, Dataset
from pipeline.fetching.sources import Source
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_file, write_atomic

CHUNK = 2**24  # bytes
CUT_SEED = 0  # the same images validate whatever the training's seed


def prepare(source: Source, validation: float, folder: Path) -> Dataset:
    """Write `source` into `folder` and return its description.

    Without a validation split in the source, a share of `validation` of its training images becomes one, stratified by
    class, always the same images. Raises UserError if a class has too few images for that.
    """
    splits: dict[str, tuple[np.ndarray, np.ndarray]] = dict(source.splits)
    rows: dict[str, np.ndarray | None] = dict.fromkeys(SPLITS)  # of a split's arrays, where not all of them in order
    origin = "official" if "val" in splits else f"{validation:g} of the training images, stratified, seed {CUT_SEED}"
    if "val" not in splits:
        rows["train"], rows["val"] = _cut(source.name, splits["train"][1], validation)
        splits["val"] = splits["train"]
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, array in zip(("images", "labels"), splits[split], strict=True):
            _write(folder / split / f"{name}.npy", array, rows[split], digest)
    dataset = Dataset(
        name=source.name,
        classes=source.classes,
        image_shape=splits["train"][0].shape[1:],
        mean=source.mean,
        std=source.std,
        images={split: len(splits[split][1] if rows[split] is None else rows[split]) for split in SPLITS},
        validation=origin,
        fingerprint=digest.hexdigest(),
    )
    write_atomic(folder / "dataset.json", dataset.model_dump_json(indent=2) + "\n")
    return dataset


def _write(path: Path, array: np.ndarray, rows: np.ndarray | None, digest: "hashlib._Hash") -> None:
    """Write those rows of `array` (None: all) as an .npy file, some at a time, and add them to the digest."""
    shape = (len(array) if rows is None else len(rows), *array.shape[1:])
    digest.update(f"{path.parent.name}/{path.stem} {array.dtype} {shape}\n".encode())
    at_a_time = max(1, CHUNK // (array.itemsize * math.prod(shape[1:])))
    with atomic_file(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, shape[0], at_a_time):
            some = slice(start, start + at_a_time)
            block = np.ascontiguousarray(array[some if rows is None else rows[some]]).data
            digest.update(block)
            file.write(block)


def _cut(name: str, labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the training images that stay, and of those that validate."""
    from sklearn.model_selection import train_test_split

    try:
        return train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=CUT_SEED)
    except ValueError as error:
        raise UserError(f"dataset {name}: no validation split can be cut from its training images: {error}") from error
