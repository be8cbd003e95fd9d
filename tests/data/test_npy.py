"""Large arrays stay on the disk. What is damaged or malicious: tests/faults/test_malformed_input.py."""

import errno
import shutil
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from pipeline.data.npy import SMALL, read_npz


def test_an_archive_is_unpacked_onto_the_disk_and_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    np.savez_compressed(tmp_path / "a.npz", a=np.ones(SMALL - 1000, np.uint8))
    tracemalloc.start()
    try:
        array = read_npz(tmp_path / "a.npz", ["a"])["a"]
        assert tracemalloc.get_traced_memory()[1] < SMALL / 8
    finally:
        tracemalloc.stop()
    assert not list(Path().iterdir())
    assert array.all()


def test_a_full_disk_is_not_taken_for_a_bad_file(npz: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "copyfileobj", Mock(side_effect=OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OSError, match="no space"):
        read_npz(npz, ["train_images"])
