import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data.dataset import UNKNOWN, load_dataset
from pipeline.data.prepared import load_evaluation_data, load_split, load_training_data, take
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import Source, read_source
from tests.conftest import prepare_npz, write_npz

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
    with pytest.raises(UserError, match=r"rare\.npz: no validation split.*: give it validation images, or .* `selection: last`"):
        prepare_npz(tmp_path / "rare", val_images=None, val_labels=None, **labels)


def test_what_most_sets_do_not_have_is_not_in_their_description(tmp_path: Path):
    prepare_npz(tmp_path / "out")
    keys = json.loads((tmp_path / "out" / "dataset.json").read_text()).keys()
    assert list(keys) == ["name", "classes", "image_shape", "mean", "std", "images", "validation", "fingerprint"]


def test_the_rule_of_resizing_and_equal_images_in_two_splits_are_in_the_description(npz: Path, tmp_path: Path):
    arrays = dict(np.load(npz))
    arrays["test_images"][:3] = arrays["train_images"][0]
    arrays["test_images"][3] = arrays["val_images"][5]
    arrays["val_images"][7] = arrays["train_images"][9]
    dataset = prepare_npz(tmp_path / "out", **arrays, resize=np.array("crop"))
    assert dataset.shared_images == {"train/val": 1, "train/test": 3, "val/test": 1}
    assert load_dataset(tmp_path / "out") == dataset
    assert dataset.resize == "crop"


@pytest.mark.parametrize("file", ["dataset.json", "train/images.npy", "val/labels.npy"])
def test_damaged_prepared_data_is_refused_by_name(tmp_path: Path, file: str):
    prepare_npz(tmp_path / "out")
    path = tmp_path / "out" / file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=path.name):
        load_training_data(tmp_path / "out", CPU)


def test_unlabelled_images_follow_the_training_images(tmp_path: Path):
    unlabelled = np.full((30, 8, 8), 3, np.uint8)
    dataset = prepare_npz(tmp_path / "data", unlabelled_images=unlabelled)
    assert dataset.images == {"train": 400, "val": 100, "test": 200, "unlabelled": 30}
    train = load_split(tmp_path / "data", "train", CPU)
    assert (len(train.images), train.labels[400:].unique().tolist()) == (430, [UNKNOWN])
    assert (train.images[400:] == 3).all()
    other = write_npz(tmp_path / "b.npz", unlabelled_images=unlabelled[:, :7])
    with pytest.raises(UserError, match="unlabelled_images have shape"):
        read_source(str(other))


def test_without_a_validation_split_all_images_are_trained_on(tmp_path: Path):
    dataset = prepare_npz(tmp_path / "data", 0, val_images=None, val_labels=None)
    assert (dataset.images, dataset.validation) == ({"train": 400, "val": 0, "test": 200}, "none")
    assert load_split(tmp_path / "data", "val", CPU).images.shape == (0, 8, 8, 1)


SIZES = {"train": 400, "val": 100, "test": 200}


def write_patients(path: Path, **changed: np.ndarray) -> Path:
    """A set whose patients have four images each: 100 in train, 25 in val, 50 in test."""
    starts = {"train": 0, "val": 100, "test": 125}
    groups = {f"{split}_groups": starts[split] + np.arange(number) // 4 for split, number in SIZES.items()}
    return write_npz(path, **groups, **changed)


def test_whose_the_test_images_are_lies_beside_them(npz: Path, tmp_path: Path):
    prepare(read_source(str(write_patients(tmp_path / "a.npz"))), 0.1, tmp_path / "out")
    patients = load_evaluation_data(tmp_path / "out", CPU).patients
    assert np.array_equal(patients == patients[0], np.arange(200) < 4)
    assert len(np.unique(patients)) == 50
    prepare(read_source(str(npz)), 0.1, tmp_path / "unknown")
    assert load_evaluation_data(tmp_path / "unknown", CPU).patients is None


def test_a_validation_split_that_is_cut_parts_no_patient(tmp_path: Path):
    path = write_patients(tmp_path / "a.npz", val_images=None, val_labels=None)
    source = read_source(str(path))
    dataset = prepare(source, 0.25, tmp_path / "out")
    assert dataset.validation == "0.25 of the training images, stratified, patients kept together, seed 0"
    assert dataset.images["val"] == pytest.approx(100, abs=12)
    whose = dict(zip(map(bytes, source.splits["train"][0]), source.patients["train"], strict=True))
    data = load_training_data(tmp_path / "out", CPU)
    train, val = ({whose[bytes(image)] for image in split.images.numpy()} for split in (data.train, data.val))
    assert not train & val
    patients = np.arange(400) // 20  # one class is of one alone, who is the most like what is wanted
    labels = {"train_labels": np.where(patients == 0, np.arange(400) % 10, patients % 9), "test_labels": np.arange(200) % 10}
    groups = {"train_groups": patients, "val_groups": np.arange(100), "test_groups": 100 + np.arange(200)}
    path = write_npz(tmp_path / "b.npz", val_images=None, val_labels=None, **labels, **groups)
    prepare(read_source(str(path)), 0.05, tmp_path / "whole")
    data = load_training_data(tmp_path / "whole", CPU)
    assert (len(data.val.labels), len(data.train.labels.unique())) == (20, 10)


def test_no_unlabelled_image_of_a_patient_in_val_or_test_is_trained_on(tmp_path: Path):
    unlabelled = {"unlabelled_images": np.full((5, 8, 8), 3, np.uint8), "unlabelled_groups": np.array([0, 100, 125, 999, 0])}
    source = read_source(str(write_patients(tmp_path / "a.npz", **unlabelled)))
    assert prepare(source, 0.1, tmp_path / "out").images["unlabelled"] == 3


def test_a_patient_in_two_splits_is_refused_but_for_folds(tmp_path: Path):
    source = read_source(str(write_npz(tmp_path / "a.npz", **{f"{split}_groups": np.arange(n) for split, n in SIZES.items()})))
    with pytest.raises(UserError, match="100 patients are in train_groups and in val_groups"):
        prepare(source, 0.1, tmp_path / "out")
    assert prepare(source, 0.1, tmp_path / "out", folds=3).folds == 3


def test_folds_test_every_image_once_and_part_no_patient(tmp_path: Path):
    unlabelled = {"unlabelled_images": np.full((6, 8, 8), 3, np.uint8), "unlabelled_groups": np.array([0, 0, 7, 7, 999, 999])}
    source = read_source(str(write_patients(tmp_path / "a.npz", **unlabelled)))
    dataset = prepare(source, 0.1, tmp_path / "out", folds=5)
    assert load_dataset(tmp_path / "out") == dataset
    assert (dataset.folds, sum(dataset.images.values()), dataset.validation) == (5, 706, "the next fold")
    held = load_evaluation_data(tmp_path / "out", CPU)
    tested = np.stack([held.rows("test", seed) for seed in range(10)])
    assert (tested.sum(axis=0) == 2).all(), "ten seeds, five folds"
    for seed in range(5):
        assert np.array_equal(held.rows("val", seed), held.rows("test", seed + 1))
        data = load_training_data(tmp_path / "out", CPU, seed)
        held_out = held.rows("test", seed) | held.rows("val", seed)
        assert not np.isin(held.patients[~held_out], held.patients[held_out]).any()
        assert np.array_equal(data.train.images[: (~held_out).sum()], held.test.images[~held_out])
        assert np.array_equal(data.val.labels, take(held.test, held.rows("val", seed)).labels)
        known = [source.patients["train"][4 * patient] for patient in (0, 7)]
        out = [np.isin(patient, held.patients[held_out]) for patient in known]
        assert (data.train.labels == UNKNOWN).sum() == 6 - 2 * sum(out), "those of patients that are held out are, too"
        assert data.train.labels[data.train.labels != UNKNOWN].bincount(minlength=10).min() > 0


def test_folds_need_no_test_images_and_their_parting_is_part_of_the_fingerprint(npz: Path, tmp_path: Path):
    source = read_source(str(npz))
    prints = {prepare(source, 0.1, tmp_path / str(folds), folds).fingerprint for folds in (None, 3, 4)}
    assert len(prints) == 3
    del (splits := dict(source.splits))["test"]
    without = replace(source, splits=splits)
    assert sum(prepare(without, 0.1, tmp_path / "less", folds=3).images.values()) == 500
    with pytest.raises(UserError, match="has no test images: give it some, or set the track's folds"):
        prepare(without, 0.1, tmp_path / "out")


def test_equal_images_in_two_folds_are_counted(npz: Path, tmp_path: Path):
    arrays = dict(np.load(npz))
    arrays["test_images"][:50] = arrays["train_images"][:50]
    source = read_source(str(write_npz(tmp_path / "a.npz", **arrays)))
    assert 10 < prepare(source, 0.1, tmp_path / "out", folds=3).shared_images["fold/another fold"] <= 50
    source = replace(source, unlabelled=source.splits["train"][0][50:350])
    assert prepare(source, 0.1, tmp_path / "more", folds=3).shared_images["fold/another fold"] >= 300


def test_too_few_images_or_patients_for_the_folds_is_one_clear_error(tmp_path: Path):
    rare = {"train_labels": np.r_[np.arange(398) % 9, 9, 9], "val_labels": np.arange(100) % 9, "test_labels": np.arange(200) % 9}
    with pytest.raises(UserError, match="5 folds: too few images or patients: a fold would be without class 9"):
        prepare(read_source(str(write_npz(tmp_path / "rare.npz", **rare))), 0.1, tmp_path / "out", folds=5)
    two = {"train_groups": np.zeros(400, int), "val_groups": np.ones(100, int), "test_groups": np.full(200, 2)}
    with pytest.raises(UserError, match="5 folds: too few images or patients"):
        prepare(read_source(str(write_npz(tmp_path / "two.npz", **two))), 0.1, tmp_path / "out", folds=5)
