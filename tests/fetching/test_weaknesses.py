from pathlib import Path

import numpy as np

from pipeline.fetch_data import weaknesses
from pipeline.fetching.sources import unread
from tests.conftest import digits, prepare_npz


def test_misspelt_arrays_and_classes_without_images_are_named(tmp_path: Path):
    _, labels = digits(700)
    few = np.minimum(labels[400:500], 7)
    dataset = prepare_npz(tmp_path / "out", val_labels=few, test_labels=labels[500:] % 3, train_group=np.arange(400))
    keys, val, test = weaknesses(dataset, tmp_path / "out", unread(tmp_path / "out.npz"))
    assert keys.startswith(": nothing reads its arrays train_group; known are train_images, ")
    assert val == " has no val image of class 8, 9: nothing is chosen by it"
    assert test == " has no test image of class 3, 4, 5, 6, 7, ...: nothing is measured by it"


def test_a_set_without_them_is_not_warned_of(npz: Path, tmp_path: Path):
    assert [*weaknesses(prepare_npz(tmp_path / "out"), tmp_path / "out", unread(npz))] == []
    without = {"val_images": None, "val_labels": None}
    assert [*weaknesses(prepare_npz(tmp_path / "more", validation=0, **without), tmp_path / "more", [])] == []
