"""Turn a source into prepared data."""

import hashlib
import math
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.files import atomic_file, write_atomic
from pipeline.data.dataset import SPLITS, Dataset
from pipeline.fetching.sources import Source

CHUNK = 2**24  # bytes
VALIDATION_SEED = 0  # the same images validate whatever the training's seed


def prepare(source: Source, validation: float, folder: Path) -> Dataset:
    """Write `source` into `folder` and return its description.

    Without a validation split in the source, a share of `validation` of its training images becomes one, stratified by
    class, always the same images. Raises UserError if a class has too few images for that.
    """
    splits, origin = dict(source.splits), "official"
    rows: dict[str, np.ndarray | None] = dict.fromkeys(SPLITS)  # of a split's arrays; None: all of them in order
    if "val" not in splits:
        rows["train"], rows["val"] = _split_rows(source.name, splits["train"][1], validation)
        splits["val"] = splits["train"]
        origin = f"{validation:g} of the training images, stratified, seed {VALIDATION_SEED}"
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
    """Write those rows of `array` (None: all) as an .npy file, a chunk at a time, and add them to the digest."""
    shape = (len(array) if rows is None else len(rows), *array.shape[1:])
    digest.update(f"{path.parent.name}/{path.stem} {array.dtype} {shape}\n".encode())
    step = max(1, CHUNK // (array.itemsize * math.prod(shape[1:])))
    with atomic_file(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, shape[0], step):
            chunk = slice(start, start + step)
            block = np.ascontiguousarray(array[chunk if rows is None else rows[chunk]]).data
            digest.update(block)
            file.write(block)


def _split_rows(name: str, labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the training images that stay, and of those that validate."""
    from sklearn.model_selection import train_test_split

    try:
        return train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=VALIDATION_SEED)
    except ValueError as error:
        raise UserError(f"dataset {name}: no validation split can be cut from its training images: {error}") from error
