"""Batches of images from a set that is too large for the memory of a device: read from the disk some batches ahead of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

AHEAD = 4  # batches


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of images leave half of the memory that is free on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        from psutil import virtual_memory

        free = virtual_memory().available
    return size <= free / 2


def streamed(images: Tensor, batches: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The images of each batch on `device`; the next batches are read meanwhile, each by a thread of its own.

    `images`, uint8 of shape (N, H, W, C), are mapped into memory; `batches` are rows, int64 of shape (B,), on any device.
    """

    def read(rows: Tensor) -> Tensor:
        batch = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, pin_memory=device.type == "cuda")
        return torch.index_select(images, 0, rows, out=batch)

    with ThreadPoolExecutor(AHEAD) as pool:
        pending: deque[Future[Tensor]] = deque()
        for rows in batches:
            pending.append(pool.submit(read, rows.cpu()))
            if len(pending) > AHEAD:
                yield pending.popleft().result().to(device, non_blocking=True)
        while pending:
            yield pending.popleft().result().to(device, non_blocking=True)
