"""Turn a source into prepared data."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core.errors import user_error
from pipeline.core.files import atomic_file, write_atomic
from pipeline.data.dataset import SPLITS, UNKNOWN, Dataset
from pipeline.data.npy import read_npy
from pipeline.fetching.duplicates import duplicates
from pipeline.fetching.sources import Source

CHUNK = 2**24  # bytes
VALIDATION_SEED = 0  # the same images validate whatever the training's seed


def prepare(source: Source, validation: float, folder: Path) -> Dataset:
    """Write `source` into `folder` and return its description.

    Without a validation split in the source, a share of `validation` of its training images becomes one, stratified by
    class, always the same images; it is empty for 0. Unlabelled images follow the training images, with the label UNKNOWN. Raises
    UserError if a class has too few images for a validation split.
    """
    rows, origin = {split: np.arange(len(labels)) for split, (_, labels) in source.splits.items()}, "official"
    if "val" not in rows and validation == 0:
        rows["val"], origin = rows["train"][:0], "none"
    elif "val" not in rows:
        from sklearn.model_selection import train_test_split

        origin = f"{validation:g} of the training images, stratified, seed {VALIDATION_SEED}"
        options = {"stratify": source.splits["train"][1], "random_state": VALIDATION_SEED}
        with user_error(f"dataset {source.name}: no validation split can be cut from its training images", ValueError):
            rows["train"], rows["val"] = train_test_split(rows["train"], test_size=validation, **options)
    digest, counts = hashlib.sha256(), {split: len(rows[split]) for split in SPLITS}
    for split in SPLITS:
        images, labels = source.splits.get(split, source.splits["train"])
        parts = [(images, labels, rows[split])]
        if split == "train" and source.unlabelled is not None:
            counts["unlabelled"] = number = len(source.unlabelled)
            parts.append((source.unlabelled, np.full(number, UNKNOWN, np.int64), np.arange(number)))
        _write(folder / split / "images.npy", [(images, of_part) for images, _, of_part in parts], digest)
        _write(folder / split / "labels.npy", [(labels, of_part) for _, labels, of_part in parts], digest)
    pairs = duplicates({split: read_npy(folder / split / "images.npy") for split in SPLITS})  # mapped, just written
    dataset = Dataset(
        name=source.name,
        classes=source.classes,
        image_shape=source.splits["train"][0].shape[1:],
        mean=source.mean,
        std=source.std,
        images=counts,
        validation=origin,
        fingerprint=digest.hexdigest(),
        resize=source.resize,
        ordered=source.ordered,
        shared_images=dict(Counter(f"{pair.other_split}/{pair.split}" for pair in pairs)),
    )
    write_atomic(folder / "dataset.json", dataset.model_dump_json(indent=2) + "\n")
    return dataset


def _write(path: Path, parts: Sequence[tuple[np.ndarray, np.ndarray]], digest: "hashlib._Hash") -> None:
    """Write those rows of each array, one after the other, as an .npy file, a chunk at a time, and add them to the digest."""
    (array, _), *_ = parts
    shape = (sum(len(rows) for _, rows in parts), *array.shape[1:])
    digest.update(f"{path.parent.name}/{path.stem} {array.dtype} {shape}\n".encode())
    step = max(1, CHUNK // (array.itemsize * math.prod(shape[1:])))
    with atomic_file(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for array, rows in parts:
            for start in range(0, len(rows), step):
                block = np.ascontiguousarray(array[rows[start : start + step]]).data
                digest.update(block)
                file.write(block)
