"""Images that stand in two splits: a model has seen there what it is tested on."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

Place = tuple[str, int]  # split and row


def duplicates(splits: Mapping[str, Iterable[np.ndarray]]) -> Iterator[tuple[Place, Place]]:
    """The images of `splits`, uint8 of shape (N, H, W, C) each, that are pixel for pixel those of an earlier split.

    Yields their places: the first in the earlier split, then theirs, once for each earlier split that has the image. Images are
    read one at a time and only their digests kept, so that they may be mapped from the disk.
    """
    first_rows: dict[str, dict[bytes, int]] = {}
    for split, images in splits.items():
        rows: dict[bytes, int] = {}
        for row, image in enumerate(images):
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()
            yield from (((other, of[digest]), (split, row)) for other, of in first_rows.items() if digest in of)
            rows.setdefault(digest, row)
        first_rows[split] = rows
