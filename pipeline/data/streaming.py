"""Batches of images: of those on the device by their numbers alone, of a set too large for it as they are read from the disk.

The set is mapped into memory. The system is told some batches ahead which images will be wanted, and reads them while the
device works.
"""

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

AHEAD = 4  # batches
WILL_NEED = 3  # MADV_WILLNEED, on Linux and macOS


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of images leave half of the memory that is free on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        from psutil import virtual_memory

        free = virtual_memory().available
    return size <= free / 2


def batches(images: Tensor, numbers: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each batch, the numbers of its images on `device`, and the images themselves if they are to be taken from here.

    `images`, uint8 of shape (N, H, W, C), are on `device`, or mapped; `numbers` are int64 of shape (B,), on `device`.
    """
    if images.device == device and (device.type != "cpu" or fits(images.nbytes, device)):
        for batch in numbers:
            yield batch, None
        return
    rows = [batch.cpu() for batch in numbers]
    for batch in rows[:AHEAD]:
        _will_need(images, batch)
    for number, batch in enumerate(rows):
        if number + AHEAD < len(rows):
            _will_need(images, rows[number + AHEAD])
        found = torch.empty((len(batch), *images.shape[1:]), dtype=images.dtype, pin_memory=device.type == "cuda")
        torch.index_select(images, 0, batch, out=found)
        yield numbers[number], found.to(device, non_blocking=True)


def _will_need(images: Tensor, batch: Tensor) -> None:
    """Have the system read those rows of a mapped tensor, without waiting for them. Where it cannot, nothing happens."""
    size = images[0].nbytes
    for number in batch.tolist():
        start = images.data_ptr() + number * size
        page = start - start % mmap.PAGESIZE
        _madvise()(ctypes.c_void_p(page), ctypes.c_size_t(start + size - page), WILL_NEED)


@functools.cache
def _madvise() -> Callable[..., Any]:
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return lambda *_: None
