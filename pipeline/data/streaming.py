"""Batches of images from a set that is too large for the memory of a device: read from the disk some batches ahead of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

AHEAD = 4  # batches


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of images leave half of the memory that is free on `device`."""
    if device.type == "cuda":
        return size <= torch.cuda.mem_get_info(device)[0] / 2
    from psutil import virtual_memory

    return size <= virtual_memory().available / 2


def streamed(images: Tensor, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch on `device`; the next batches are read meanwhile, each by a thread of its own.

    `images`, uint8 of shape (N, H, W, C), are mapped into memory; `batches` are rows, int64 of shape (B,), on any device.
    """

    def read(rows: Tensor) -> Tensor:
        batch = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, pin_memory=device.type == "cuda")
        return torch.index_select(images, 0, rows, out=batch)

    with ThreadPoolExecutor(AHEAD) as pool:
        started = (pool.submit(read, rows.cpu()) for rows in batches)
        pending = deque(islice(started, AHEAD))
        while pending:
            batch = pending.popleft().result()
            pending.extend(islice(started, 1))
            yield batch.to(device, non_blocking=True)
