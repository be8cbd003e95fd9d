"""NumPy's .npy and .npz files from anywhere: no code in them is run, and no memory taken on their word alone.

Arrays stay on the disk and are mapped into memory, where the system keeps of them what there is room for.
"""

import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pipeline.core.errors import user_error

PLAUSIBLE = 100  # times its own size that an archive may unpack to: images rarely reach 10, a bomb 1000
SMALL = 64 * 2**20  # bytes that any archive may unpack to


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file, mapped and read-only. Raises UserError if it is missing, damaged, or holds Python objects."""
    with user_error(f"{path}: truncated, or not an .npy file of plain numbers", Exception):  # a dozen types on malformed bytes
        return _mapped(path)


def read_npz(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive that `names` lists and the archive has, read-only, unpacked into nameless temporary files.

    Raises UserError as `read_npy`, and for an archive that would unpack to an implausible size.
    """
    arrays = {}
    wrong = f"{path}: truncated, or not an .npz file of plain arrays"
    with user_error(wrong, Exception), zipfile.ZipFile(path) as archive:  # likewise
        members = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in archive.namelist()}
        if twice := [name for name in members if archive.namelist().count(f"{name}.npy") > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        size = sum(member.file_size for member in members.values())
        if size > max(SMALL, PLAUSIBLE * path.stat().st_size):
            raise ValueError(f"its arrays would be {size:,} bytes, over {PLAUSIBLE} times the file's size")
        for name, member in members.items():
            # In the working directory, since /tmp may be memory.
            with archive.open(member) as packed, tempfile.TemporaryFile(dir=".") as file:
                shutil.copyfileobj(packed, file, 2**20)  # no more than member.file_size bytes; their CRC is checked
                file.seek(0)
                with user_error(name, ValueError):
                    arrays[name] = _mapped(Path(f"/dev/fd/{file.fileno()}"))  # NumPy maps by name, and the file has no other
    return arrays


def _mapped(path: Path) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"):  # of what a damaged header brings about: it is refused
        array = np.lib.format.open_memmap(path, mode="r")  # refuses Python objects, and arrays that go beyond the file
    if surplus := path.stat().st_size - array.offset - array.nbytes:
        raise ValueError(f"{surplus} bytes more than an array of shape {array.shape} and dtype {array.dtype} has")
    return np.asarray(array)
