"""Images that stand in two splits: a model has seen there what it is tested on."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Duplicate(NamedTuple):
    """An image of one split whose pixels are those of an image in an earlier split."""

    split: str
    row: int
    other_split: str
    other_row: int  # the first of them


def duplicates(splits: Mapping[str, Iterable[np.ndarray]]) -> list[Duplicate]:
    """The images of `splits`, uint8 of shape (N, H, W, C) each, that are pixel for pixel those of an earlier split.

    Every image is listed once for each earlier split that has it. Images are read one at a time and only their digests kept,
    so that they may be mapped from the disk.
    """
    first_rows: dict[str, dict[bytes, int]] = {}
    pairs = []
    for split, images in splits.items():
        rows: dict[bytes, int] = {}
        for row, image in enumerate(images):
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
            pairs += [Duplicate(split, row, other, of[digest]) for other, of in first_rows.items() if digest in of]
            rows.setdefault(digest, row)
        first_rows[split] = rows
    return pairs
