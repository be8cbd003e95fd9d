"""Which image is in which split: stratified by class, every patient in one split alone."""

from collections import defaultdict

import numpy as np

from pipeline.core.errors import UserError, user_error
from pipeline.data.dataset import SPLITS
from pipeline.fetching.labelled_files import UNLABELLED, ImageFile, LeftOut
from pipeline.fetching.preparation import nearest, parted

TEST, VAL, VAL_OF_TRAIN = 5, 8, 10  # a fifth; an eighth of what is left: 70/10/20; a tenth of a given training split


def split_files(files: list[ImageFile]) -> tuple[list[ImageFile], list[LeftOut]]:
    """`files` in the order train, val, test, unlabelled, each with its split.

    Splits that are given stay. Without any, images are cut about 70/10/20; a missing validation split is cut from the training
    images where patients are known, since nothing after this knows them. Unlabelled images of patients in val and test are
    left out: a model must not learn from them. Raises UserError if some images alone have a patient, if a patient is in two
    of the given splits, if train or test is missing, and if there are too few images or patients.
    """
    labelled = [file for file in files if file.label]
    if not labelled:
        raise UserError("there are no images with a label: SOURCE/<class>/ and --table are where they come from")
    nameless = [file.name for file in labelled if not file.patient]
    if 0 < len(nameless) < len(labelled):
        raise UserError(f"{nameless[0]} names no patient, though other files do: a table or --group can say whose they are")
    given = {file.split for file in labelled} - {""}
    if given and (missing := {"train", "test"} - given):
        raise UserError(f"there is no image in {max(missing)}: without any split, they are cut here")
    if not given:
        labelled = _cut([file._replace(split="train") for file in labelled], "test", TEST)
        labelled = _cut(labelled, "val", VAL)
    splits = _splits_by_patient(labelled)
    if parted := [patient for patient, parts in splits.items() if len(parts) > 1]:
        places = ", ".join(sorted(splits[parted[0]]))
        raise UserError(
            f"{len(parted):,} patients are in two splits, such as {parted[0]!r} ({places}): every one belongs into one"
        )
    if given and "val" not in given and splits:
        labelled = _cut(labelled, "val", VAL_OF_TRAIN)
        splits = _splits_by_patient(labelled)
    unlabelled = [file._replace(split=UNLABELLED) for file in files if not file.label]
    apart = [LeftOut("unlabelled, of a patient in val or test", f.name) for f in unlabelled if splits[f.patient] - {"train"}]
    taken = [file for file in unlabelled if not splits[file.patient] - {"train"}]
    return [*sorted(labelled, key=lambda file: SPLITS.index(file.split)), *taken], apart


def _splits_by_patient(files: list[ImageFile]) -> dict[str, set[str]]:
    splits = defaultdict(set)
    for file in files:
        if file.patient:
            splits[file.patient].add(file.split)
    return splits


def _cut(files: list[ImageFile], split: str, folds: int) -> list[ImageFile]:
    """`files` with one of `folds` parts of those in train moved to `split`: the part most like them in its counts by class."""
    rows = np.array([row for row, file in enumerate(files) if file.split == "train"])
    labels = np.unique([files[row].label for row in rows], return_inverse=True)[1]
    patients = [files[row].patient for row in rows]
    advice, problem = "give splits, as folders or in a table", f"no {split} split can be cut: too few images or patients"
    with user_error(problem, ValueError, then=advice):
        parts = parted(labels, patients if any(patients) else None, folds)
        part = nearest(parts, labels, np.bincount(labels) / folds)
        if not 0 < len(part) < len(rows):
            raise ValueError(f"{len({*patients})} patients")
    moved = {*rows[part].tolist()}
    return [file._replace(split=split) if row in moved else file for row, file in enumerate(files)]
