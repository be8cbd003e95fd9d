import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data.dataset import UNKNOWN, load_dataset
from pipeline.data.prepared import load_split, load_training_data
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import Source, read_source
from tests.conftest import write_npz

CPU = torch.device("cpu")


def test_prepared_data_is_what_the_source_held(npz: Path, tmp_path: Path):
    source = read_source(str(npz))
    dataset = prepare(source, 0.1, tmp_path / "out")
    assert load_dataset(tmp_path / "out") == dataset
    assert (dataset.images, dataset.validation) == ({"train": 400, "val": 100, "test": 200}, "official")
    for split, arrays in source.splits.items():
        assert all(map(np.array_equal, load_split(tmp_path / "out", split, CPU), arrays))


def test_a_missing_validation_split_is_cut_from_training_images_stratified_and_always_the_same(tmp_path: Path):
    source = read_source(str(write_npz(tmp_path / "bare.npz", val_images=None, val_labels=None)))
    first, second = (prepare(source, 0.25, tmp_path / name) for name in "ab")
    assert first == second
    assert first.images == {"train": 300, "val": 100, "test": 200}
    data = load_training_data(tmp_path / "a", CPU)
    images, labels = source.splits["train"]
    assert np.allclose(np.bincount(data.val.labels), np.bincount(labels) * 0.25, atol=1)
    assert sorted(map(bytes, [*data.train.images.numpy(), *data.val.images.numpy()])) == sorted(map(bytes, images))


def test_the_fingerprint_follows_every_pixel_and_label_and_nothing_else(npz: Path, tmp_path: Path):
    source = read_source(str(npz))
    fingerprint = prepare(source, 0.1, tmp_path / "a").fingerprint
    assert prepare(source, 0.2, tmp_path / "b").fingerprint == fingerprint
    for split in source.splits:
        for part in (0, 1):
            arrays = [array.copy() for array in source.splits[split]]
            arrays[part].flat[-1] ^= 1
            changed = Source(source.name, source.classes, {**source.splits, split: tuple(arrays)})
            assert prepare(changed, 0.1, tmp_path / "c").fingerprint != fingerprint


def test_a_class_with_one_image_leaves_no_stratified_split(tmp_path: Path):
    labels = {"train_labels": np.arange(400) // 399, "test_labels": np.arange(200) % 2}
    source = read_source(str(write_npz(tmp_path / "rare.npz", val_images=None, val_labels=None, **labels)))
    with pytest.raises(UserError, match=r"rare\.npz: no validation split"):
        prepare(source, 0.1, tmp_path / "out")


def test_what_most_sets_do_not_have_is_not_in_their_description(npz: Path, tmp_path: Path):
    prepare(read_source(str(npz)), 0.1, tmp_path / "out")
    keys = json.loads((tmp_path / "out" / "dataset.json").read_text()).keys()
    assert list(keys) == ["name", "classes", "image_shape", "mean", "std", "images", "validation", "fingerprint"]


def test_the_rule_of_resizing_and_equal_images_in_two_splits_are_in_the_description(npz: Path, tmp_path: Path):
    arrays = dict(np.load(npz))
    arrays["test_images"][:3] = arrays["train_images"][0]
    arrays["test_images"][3] = arrays["val_images"][5]
    arrays["val_images"][7] = arrays["train_images"][9]
    path = write_npz(tmp_path / "other.npz", **arrays, resize=np.array("crop"))
    dataset = prepare(read_source(str(path)), 0.1, tmp_path / "out")
    assert dataset.shared_images == {"train/val": 1, "train/test": 3, "val/test": 1}
    assert load_dataset(tmp_path / "out") == dataset
    assert dataset.resize == "crop"


@pytest.mark.parametrize("file", ["dataset.json", "train/images.npy", "val/labels.npy"])
def test_damaged_prepared_data_is_refused_by_name(npz: Path, tmp_path: Path, file: str):
    prepare(read_source(str(npz)), 0.1, tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=path.name):
        load_training_data(tmp_path / "out", CPU)


def test_unlabelled_images_follow_the_training_images(tmp_path: Path):
    unlabelled = np.full((30, 8, 8), 3, np.uint8)
    dataset = prepare(read_source(str(write_npz(tmp_path / "a.npz", unlabelled_images=unlabelled))), 0.1, tmp_path / "data")
    assert dataset.images == {"train": 400, "val": 100, "test": 200, "unlabelled": 30}
    train = load_split(tmp_path / "data", "train", CPU)
    assert (len(train.images), train.labels[400:].unique().tolist()) == (430, [UNKNOWN])
    assert (train.images[400:] == 3).all()
    other = write_npz(tmp_path / "b.npz", unlabelled_images=unlabelled[:, :7])
    with pytest.raises(UserError, match="unlabelled_images have shape"):
        read_source(str(other))


def test_without_a_validation_split_all_images_are_trained_on(tmp_path: Path):
    source = read_source(str(write_npz(tmp_path / "a.npz", val_images=None, val_labels=None)))
    dataset = prepare(source, 0, tmp_path / "data")
    assert (dataset.images, dataset.validation) == ({"train": 400, "val": 0, "test": 200}, "none")
    assert load_split(tmp_path / "data", "val", CPU).images.shape == (0, 8, 8, 1)
