"""NumPy's .npy and .npz files from anywhere: no code in them is run, and no memory taken on their word alone.

Large arrays stay on the disk and are mapped into memory, where the system keeps of them what there is room for.
"""

import contextlib
import errno
import math
import mmap
import os
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from pipeline.core.errors import UserError

PLAUSIBLE = 100  # times its own size that an archive may unpack to: images rarely reach 10, a bomb 1000
SMALL = 64 * 2**20  # bytes that any archive may unpack to, and that an array may take of the memory
CHUNK = 2**24  # bytes
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file, mapped, not to be written to.

    Raises UserError for a file that is missing, damaged, or holds Python objects.
    """
    with _refused(path, "an .npy file of plain numbers"), path.open("rb") as file:
        shape, dtype, order = _header(file, path.stat().st_size)
        offset = file.tell()
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), offset, order=order)


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of `names` that an .npz archive has, with their arrays, large ones in temporary files.

    Raises UserError as `read_npy`, and for a bomb.
    """
    with _refused(path, "an .npz file of plain arrays"), zipfile.ZipFile(path) as archive:
        there = set(archive.namelist())
        members = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in there}
        size = sum(member.file_size for member in members.values())
        if size > max(SMALL, PLAUSIBLE * path.stat().st_size):
            raise ValueError(f"its arrays would be {size:,} bytes, over {PLAUSIBLE} times the file's size")
        arrays = {}
        for name, member in members.items():
            with archive.open(member) as file:  # gives no more than `file_size` bytes, and checks their CRC
                arrays[name] = _read(file, member.file_size)
        return arrays


def _header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"]]:
    """Shape, dtype and order of the array in an .npy file of `size` bytes, of which the header has been read then."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the format is not for plain arrays")
    shape, fortran_order, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("Python objects are not read")
    data = size - file.tell()
    if min(shape, default=0) < 0 or dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != data:
        raise ValueError(f"{data} bytes are no array of shape {shape} and dtype {dtype}")
    return shape, dtype, "F" if fortran_order else "C"


def _read(file: BinaryIO, size: int) -> np.ndarray:
    """The array in an .npy file of `size` bytes that cannot be mapped."""
    shape, dtype, order = _header(file, size)
    data = size - file.tell()
    content = bytearray(data) if data <= SMALL else _on_disk(data)
    view, at = memoryview(content), 0
    while count := file.readinto(view[at : at + CHUNK]):
        at += count
    if at < data:
        raise EOFError(f"{data - at} bytes are missing")
    return np.ndarray(shape, dtype, content, order=order)


def _on_disk(size: int) -> mmap.mmap:
    """`size` bytes of a file without a name, which is gone when it is no longer used, however the process ends."""
    with tempfile.TemporaryFile(dir=".") as file:  # /tmp may be memory
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)  # or else a full disk would show as a bus error
        file.truncate(size)
        return mmap.mmap(file.fileno(), size)


@contextlib.contextmanager
def _refused(path: Path, wanted: str) -> Iterator[None]:
    """Turn what reading makes of a bad file into a UserError: zipfile, zlib and NumPy raise a dozen types on hostile bytes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: truncated, or not {wanted}: {error}") from error
