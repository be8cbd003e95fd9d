"""Large arrays stay on the disk. What is damaged or malicious: tests/faults/test_inputs.py, too."""

import errno
import shutil
import tracemalloc
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.data.npy import SMALL, read_npy, read_npz
from tests.hostile import NO_ARRAY


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


def test_a_bomb_is_not_unpacked(tmp_path: Path):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros(2 * SMALL, np.uint8))
    with pytest.raises(UserError, match=r"bomb\.npz.*134,\d\d\d,\d\d\d bytes, over 100 times"):
        read_npz(tmp_path / "bomb.npz", ["images"])


def test_a_header_that_lies_is_refused(tmp_path: Path):
    for content in NO_ARRAY:
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npy"):
            read_npy(tmp_path / "a.npy")


def test_which_array_of_an_archive_is_wrong_is_said(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3), labels=np.array([1, "b"], object))
    with pytest.raises(UserError, match=r"a\.npz.*labels.*Python objects"):
        read_npz(tmp_path / "a.npz", ["images", "labels"])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("images.npy", b"")
    with pytest.raises(UserError, match=r"a\.npz.*images stands twice"):
        read_npz(tmp_path / "a.npz", ["images"])


BLANK = np.zeros((60_000, 28, 28), np.uint8)  # compresses as well as a bomb


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("values", [np.arange(24).reshape(2, 3, 4), np.zeros((0, 8)), np.array(["a", "bc"]), np.array(3), BLANK])
def test_arrays_come_back_as_they_were(tmp_path: Path, values: np.ndarray, order: str):
    values = np.asarray(values, order=order)
    np.save(tmp_path / "a.npy", values)
    np.savez_compressed(tmp_path / "a.npz", a=values, other=values)
    for actual in (read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz", ["a", "b"])["a"]):
        np.testing.assert_array_equal(actual, values)
        assert actual.dtype == values.dtype
