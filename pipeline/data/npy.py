"""NumPy's .npy and .npz files from anywhere: no code in them is run, and no memory taken on their word alone.

Arrays stay on the disk and are mapped into memory, where the system keeps of them what there is room for.
"""

import contextlib
import errno
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError

PLAUSIBLE = 100  # times its own size that an archive may unpack to: images rarely reach 10, a bomb 1000
SMALL = 64 * 2**20  # bytes that any archive may unpack to
CHUNK = 2**20  # bytes


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file, mapped and read-only.

    Raises UserError for a file that is missing, damaged, or holds Python objects.
    """
    with _refused(path, "an .npy file of plain numbers"):
        return _mapped(path)


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive that `names` lists and the archive has, read-only, unpacked into nameless temporary files.

    Raises UserError as `read_npy`, and for an archive that would unpack to an implausible size.
    """
    with _refused(path, "an .npz file of plain arrays"), zipfile.ZipFile(path) as archive:
        present = set(archive.namelist())
        members = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in present}
        size = sum(member.file_size for member in members.values())
        if size > max(SMALL, PLAUSIBLE * path.stat().st_size):
            raise ValueError(f"its arrays would be {size:,} bytes, over {PLAUSIBLE} times the file's size")
        return {name: _unpacked(archive, member) for name, member in members.items()}


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """The array in an archive's member, in a temporary file that vanishes with it, however the process ends."""
    # In the working directory, since /tmp may be memory.
    with archive.open(member) as packed, tempfile.TemporaryFile(dir=".") as file:
        shutil.copyfileobj(packed, file, CHUNK)  # no more than member.file_size bytes; their CRC is checked
        file.seek(0)
        return _mapped(Path(f"/dev/fd/{file.fileno()}"))  # NumPy maps by name, and the file has no other


def _mapped(path: Path) -> np.ndarray:
    array = np.lib.format.open_memmap(path, mode="r")  # refuses Python objects, and arrays that go beyond the file
    surplus = path.stat().st_size - array.offset - array.nbytes
    if surplus:
        raise ValueError(f"{surplus} bytes more than an array of shape {array.shape} and dtype {array.dtype} has")
    return np.asarray(array)


@contextlib.contextmanager
def _refused(path: Path, wanted: str) -> Iterator[None]:
    """Turn the errors of reading a bad file into a UserError: zipfile, zlib and NumPy raise a dozen types on hostile bytes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path}: truncated, or not {wanted}: {error}") from error
