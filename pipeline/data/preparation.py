"""Turn a source into prepared data."""

import hashlib
import io
from pathlib import Path

import numpy as np

from pipeline.data.prepared import SPLITS, Dataset
from pipeline.data.sources import Source
from pipeline.errors import UserError
from pipeline.files import write_whole

CUT_SEED = 0  # the same images validate whatever the training's seed


def prepare(source: Source, validation: float, folder: Path) -> Dataset:
    """Write `source` into `folder` and return its description.

    Without a validation split in the source, a share of `validation` of its training images becomes one, stratified by
    class, always the same images. Raises UserError if a class has too few images for that.
    """
    splits = dict(source.splits)
    origin = "official" if "val" in splits else f"{validation:g} of the training images, stratified, seed {CUT_SEED}"
    if "val" not in splits:
        splits["train"], splits["val"] = _cut(source.name, *splits["train"], validation)
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, array in zip(("images", "labels"), splits[split], strict=True):
            digest.update(f"{split}/{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            write_whole(folder / split / f"{name}.npy", buffer.getvalue())
    dataset = Dataset(
        name=source.name,
        classes=source.classes,
        image_shape=splits["train"][0].shape[1:],
        mean=source.mean,
        std=source.std,
        images={split: len(splits[split][1]) for split in SPLITS},
        validation=origin,
        fingerprint=digest.hexdigest(),
    )
    write_whole(folder / "dataset.json", dataset.model_dump_json(indent=2) + "\n")
    return dataset


def _cut(name: str, images: np.ndarray, labels: np.ndarray, share: float) -> tuple[tuple, tuple]:
    from sklearn.model_selection import train_test_split

    try:
        train, val = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=CUT_SEED)
    except ValueError as error:
        raise UserError(f"dataset {name}: no validation split can be cut from its training images: {error}") from error
    return (images[train], labels[train]), (images[val], labels[val])
