from pathlib import Path

import numpy as np

from pipeline.evaluation import statistics
from pipeline.fetch_data import FEWEST, weaknesses
from pipeline.fetching.sources import unread
from tests.conftest import digits, prepare_npz


def test_misspelt_arrays_and_classes_without_images_are_named(tmp_path: Path):
    _, labels = digits(700)
    few = np.minimum(labels[400:500], 7)
    dataset = prepare_npz(tmp_path / "out", val_labels=few, test_labels=labels[500:] % 3, train_group=np.arange(400))
    keys, val, test, *_ = weaknesses(dataset, tmp_path / "out", unread(tmp_path / "out.npz"))
    assert keys.startswith(": nothing reads its arrays train_group; known are train_images, ")
    assert val == " has no val image of class 8, 9: nothing is chosen by it"
    assert test == " has no test image of class 3, 4, 5, 6, 7, ...: nothing is measured by it"


def test_a_set_without_them_is_not_warned_of(npz: Path, tmp_path: Path):
    assert [*weaknesses(prepare_npz(tmp_path / "out"), tmp_path / "out", unread(npz))] == []
    without = {"val_images": None, "val_labels": None}
    assert [*weaknesses(prepare_npz(tmp_path / "more", validation=0, **without), tmp_path / "more", [])] == []


def test_what_can_have_no_verdict_is_said_before_anything_is_trained(tmp_path: Path):
    assert FEWEST == statistics.FEWEST_IMAGES
    rare = np.arange(200) % 9 + (np.arange(200) == 8)
    dataset = prepare_npz(tmp_path / "out", test_labels=rare)
    wanted = "verdicts on AUC and balanced accuracy want 10 of each"
    assert [*weaknesses(dataset, tmp_path / "out", [])] == [f" has few test images of class 9 (1): {wanted}"]
    dataset = prepare_npz(tmp_path / "nine", test_images=digits(700)[0][500:509], test_labels=np.arange(9))
    absent, few = weaknesses(dataset, tmp_path / "nine", [])
    assert (absent[:19], few[:38]) == (" has no test image ", " has few test images of class 0 (1), 1"), (
        "of accuracy there may be one"
    )
    groups = {"train_groups": np.arange(400), "val_groups": np.arange(100) + 400, "test_groups": np.arange(200) % 5 + 500}
    dataset = prepare_npz(tmp_path / "five", **groups)
    assert [*weaknesses(dataset, tmp_path / "five", [])] == [" has 5 test patients: no verdict is on fewer than 10"]
    groups["test_groups"] = np.arange(200) % 11 + 500
    dataset = prepare_npz(tmp_path / "eleven", **groups, test_labels=np.arange(200) % 11 % 10)
    (few,) = weaknesses(dataset, tmp_path / "eleven", [])
    assert few.startswith(" has few test patients of class 0 (2), 1 (1), 2 (1), 3 (1), 4 (1), ...: verdicts")
