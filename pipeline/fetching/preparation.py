"""Turn a source into prepared data."""

import hashlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError, user_error
from pipeline.core.files import atomic_file, write_atomic
from pipeline.data.dataset import SPLITS, UNKNOWN, Dataset, held_out
from pipeline.data.npy import read_npy
from pipeline.fetching.duplicates import duplicates
from pipeline.fetching.sources import Source

CHUNK = 2**24  # bytes
Parts = dict[str, list[tuple[str, np.ndarray]]]  # by split: of which of the source's, and which rows of it
SEED = 0  # the same images validate, and are in the same fold, whatever the training's seed


def prepare(source: Source, validation: float, folder: Path, folds: int | None = None) -> Dataset:
    """Write `source` into `folder` and return its description.

    Without a validation split in the source, a share of `validation` of its training images becomes one, stratified by
    class, always the same images, about that many where patients are kept together; it is empty for 0. For a cross-validation,
    all images of the source are parted into `folds`, likewise. Unlabelled images follow the training images, labelled UNKNOWN,
    those of patients in the other splits left out.
    Raises UserError if there are too few images or patients, and for a source without test images but for folds.
    """
    if not folds and "test" not in source.splits:
        raise UserError(f"dataset {source.name} has no test images: give it some, or set the track's folds, such as 5")
    if folds:
        all_images, origin = [(split, np.arange(len(labels))) for split, (_, labels) in source.splits.items()], "the next fold"
        fold_numbers, unlabelled = _folds(source, folds)
        parts = {"train": all_images, "val": [("train", np.arange(0))], "test": all_images}
    else:
        parts, origin = _parts(source, validation)
        unlabelled = _unlabelled(source, [*parts["val"], *parts["test"]])
    digest = hashlib.sha256()
    for split, of_split in parts.items():
        arrays = [(*source.splits[name], rows) for name, rows in of_split]
        if split == "train" and source.unlabelled is not None:
            arrays.append((source.unlabelled, np.full(len(source.unlabelled), UNKNOWN, np.int64), unlabelled))
        _write(folder / split / "images.npy", [(images, rows) for images, _, rows in arrays], digest)
        _write(folder / split / "labels.npy", [(labels, rows) for _, labels, rows in arrays], digest)
    if source.patients:
        _write(folder / "test" / "patients.npy", [(source.patients[name], rows) for name, rows in parts["test"]])
    if folds:
        _write(folder / "train" / "folds.npy", [(fold_numbers, np.arange(len(fold_numbers)))], digest)
        _write(folder / "test" / "folds.npy", [(fold_numbers, np.arange(sum(len(rows) for _, rows in parts["test"])))])
    images = {split: sum(len(rows) for _, rows in of_split) for split, of_split in parts.items()}
    stored = {split: read_npy(folder / split / "images.npy") for split in SPLITS}  # mapped, just written
    if folds:
        images, stored = _by_fold(fold_numbers, folds, stored)
    if len(unlabelled):
        images["unlabelled"] = len(unlabelled)
    shared = Counter("fold/another fold" if folds else f"{other}/{split}" for (other, _), (split, _) in duplicates(stored))
    dataset = Dataset(
        name=source.name,
        classes=source.classes,
        image_shape=source.splits["train"][0].shape[1:],
        mean=source.mean,
        std=source.std,
        images=images,
        validation=origin,
        fingerprint=digest.hexdigest(),
        resize=source.resize,
        ordered=source.ordered,
        shared_images=dict(shared),
        folds=folds or 0,
    )
    write_atomic(folder / "dataset.json", dataset.model_dump_json(indent=2) + "\n")
    return dataset


def _by_fold(numbers: np.ndarray, folds: int, stored: dict[str, np.ndarray]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The numbers of images that the first seed trains on, validates and tests; and the images of each fold.

    `numbers` (N,) says which fold each training image is in, first those with a label, which are the test images.
    """
    labelled = numbers[: len(stored["test"])]
    images = {split: int(held_out(labelled, folds, 0, split).sum()) for split in ("val", "test")}
    by_fold = {f"fold {fold}": stored["test"][labelled == fold] for fold in range(folds)}
    return {"train": len(labelled) - sum(images.values())} | images, by_fold | {"no fold": stored["train"][numbers < 0]}


def _parts(source: Source, validation: float) -> tuple[Parts, str]:
    """The source's splits, and where the validation split comes from. Raises UserError if one parts a patient."""
    for split, other in itertools.combinations(source.splits if source.patients else (), 2):
        if shared := len(np.intersect1d(source.patients[split], source.patients[other])):
            raise UserError(
                f"dataset {source.name}: {shared:,} patients are in {split}_groups and in {other}_groups: one is wanted"
            )
    parts, origin = {split: [(split, np.arange(len(labels)))] for split, (_, labels) in source.splits.items()}, "official"
    if "val" not in parts:
        (_, train), *_ = parts["train"]
        val, origin = train[:0], "none"
        if validation:
            (train, val), kept = _cut(source, validation), ", patients kept together" if source.patients else ""
            origin = f"{validation:g} of the training images, stratified{kept}, seed {SEED}"
        parts |= {"train": [("train", train)], "val": [("train", val)]}
    return {split: parts[split] for split in SPLITS if split in parts}, origin


def _cut(source: Source, validation: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the training images that stay, and those of a validation split."""
    from sklearn.model_selection import train_test_split

    labels, patients = source.splits["train"][1], source.patients.get("train")
    advice = "give it validation images, or take a larger `validation`, or 0 with `selection: last`"
    with user_error(f"dataset {source.name}: no validation split can be cut from its training images", ValueError, then=advice):
        if patients is None:
            options = {"stratify": labels, "random_state": SEED}
            return train_test_split(np.arange(len(labels)), test_size=validation, **options)
        parts = parted(labels, patients, max(2, min(round(1 / validation), len(np.unique(patients)))))
        leaves_all_classes = [part for part in parts if len(np.unique(np.delete(labels, part))) == len(np.unique(labels))]
        if not leaves_all_classes:
            raise ValueError("a class is of one patient alone")
        val = nearest(leaves_all_classes, labels, validation * np.bincount(labels))
        return np.delete(np.arange(len(labels)), val), val


def parted(labels: np.ndarray, patients: Sequence[int | str] | None, parts: int) -> list[np.ndarray]:
    """The rows of each part, stratified by label (N,); a patient's (N,) are in one part alone. Raises ValueError for too few."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter = (StratifiedKFold if patients is None else StratifiedGroupKFold)(parts, shuffle=True, random_state=SEED)
    with warnings.catch_warnings(action="ignore"):  # of a class with few images: callers check the result
        return [rows for _, rows in splitter.split(labels, labels, patients)]


def nearest(parts: Sequence[np.ndarray], labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The part whose numbers of images by label differ least from those `wanted` (K,)."""
    return min(parts, key=lambda rows: np.abs(np.bincount(labels[rows], minlength=len(wanted)) - wanted).sum())


def _unlabelled(source: Source, held_out: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The unlabelled images to train on: all, or where it is known whose they are, those of no patient in `held_out`."""
    if (whose := source.patients.get("unlabelled")) is None:
        return np.arange(0 if source.unlabelled is None else len(source.unlabelled))
    return np.flatnonzero(~np.isin(whose, np.concatenate([source.patients[split][rows] for split, rows in held_out])))


def _folds(source: Source, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """The fold that each image is in, int64 (N,): those of all splits, then the unlabelled ones; and which of these are taken.

    Every class is in every fold. An unlabelled image is in its patient's, in none if that has no other images. Where patients are
    known, those that are not said to be anybody's are left out.
    """
    labels = np.concatenate([labels for _, labels in source.splits.values()])
    patients = np.concatenate([source.patients[split] for split in source.splits]) if source.patients else None
    of_images = np.empty(len(labels), np.int64)
    with user_error(f"dataset {source.name}: {folds} folds: too few images or patients", ValueError):
        for fold, rows in enumerate(parted(labels, patients, folds)):
            of_images[rows] = fold
        for label, name in enumerate(source.classes):
            if len(np.unique(of_images[labels == label])) < folds:
                raise ValueError(f"a fold would be without class {name}")
    taken = np.arange(0 if source.unlabelled is None else len(source.unlabelled))
    if patients is None:
        return np.concatenate([of_images, np.full(len(taken), UNKNOWN)]), taken
    whose = source.patients.get("unlabelled", np.full(len(taken), UNKNOWN))
    taken = taken[whose != UNKNOWN]
    of_patients = dict(zip(patients.tolist(), of_images.tolist(), strict=True))
    of_unlabelled = [of_patients.get(patient, UNKNOWN) for patient in whose[taken].tolist()]
    return np.array([*of_images.tolist(), *of_unlabelled], np.int64), taken


def _write(path: Path, parts: Sequence[tuple[np.ndarray, np.ndarray]], digest: "hashlib._Hash | None" = None) -> None:
    """Write those rows of each array, one after the other, as an .npy file, a chunk at a time, and add them to the digest."""
    digest = digest or hashlib.sha256()
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
