import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.augmentation import view_indices
from pipeline.data.prepared import load_split
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import read_description
from pipeline.networks.inference import predict
from pipeline.training import recipe as module
from pipeline.training.cache import Record, read_record
from pipeline.training.recipe import Recipe, train
from tests.conftest import write_npz
from tests.training.conftest import SETTINGS


def key(recipe: Recipe, root: Path) -> str:
    return read_description(train(recipe, root, lambda record: None)).digest


def test_a_training_leaves_checkpoint_and_record(teacher: Recipe, tmp_path: Path):
    records: list[Record] = []
    path = train(teacher, tmp_path / "root", lambda record: records.append(record.model_copy(deep=True)))
    description = read_description(path)
    assert [len(record.history) for record in records] == [0, 1, 2, 2]
    assert records[-1] == read_record(tmp_path / "root", description.digest)
    assert records[-1].checkpoint_md5 == md5(path)
    assert records[-1].started > 0 < records[-1].seconds
    assert len(records[-1].loads) == 2
    assert Record.of_checkpoint(path) == records[-1].model_copy(update={"started": None, "seconds": None, "loads": []})


def test_a_finished_training_is_taken_from_the_cache(teacher: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = train(teacher, tmp_path / "root", lambda record: None).read_bytes()
    monkeypatch.setattr(module, "_carry_out", None)
    records = []
    assert train(teacher, tmp_path / "root", records.append).read_bytes() == before
    assert [record.finished for record in records] == [True]


class KilledError(Exception):
    pass


def test_an_interrupted_training_resumes_to_the_same_bytes(teacher: Recipe, tmp_path: Path):
    def interrupt(record: Record) -> None:
        if len(record.history) == 1:
            raise KilledError

    with pytest.raises(KilledError):
        train(teacher, tmp_path / "root", interrupt)
    seen = []
    path = train(teacher, tmp_path / "root", lambda record: seen.append(len(record.history)))
    assert seen == [1, 2, 2]
    assert path.read_bytes() == train(teacher, tmp_path / "other", lambda record: None).read_bytes()
    record = read_record(tmp_path / "root", path.parent.name)
    assert len(record.loads) == 2


def test_a_loss_that_is_not_finite_is_recorded_and_told(teacher: Recipe, tmp_path: Path):
    records = []
    wild = dataclasses.replace(teacher, settings=SETTINGS | {"lr": 1e30})
    with pytest.raises(UserError, match="not finite at a learning rate of 1e"):
        train(wild, tmp_path / "root", records.append)
    assert "not finite" in records[-1].failed


def test_the_digest_changes_with_whatever_decides_the_training(teacher: Recipe, tmp_path: Path, monkeypatch):
    root = tmp_path / "root"
    student = {"kd": {"temperature": 5.0, "alpha": 0.7, "divergence": "forward"}, "model": "student_distilled"}
    path = train(teacher, root, lambda record: None)
    other = train(dataclasses.replace(teacher, seed=1), root, lambda record: None)
    distilled = dataclasses.replace(teacher, **student, teachers=(path,))
    write_npz(tmp_path / "more.npz", val_images=None, val_labels=None)
    prepare(read_source(str(tmp_path / "more.npz")), 0.1, tmp_path / "more")
    varied = [
        teacher,
        dataclasses.replace(teacher, seed=1),
        dataclasses.replace(teacher, data=tmp_path / "more"),
        dataclasses.replace(teacher, threads=2),
        dataclasses.replace(teacher, label_fraction=0.5),
        dataclasses.replace(teacher, settings=SETTINGS | {"lr": 0.02}),
        dataclasses.replace(teacher, arguments={"width": 5, "hidden": 8}),
        distilled,
        dataclasses.replace(distilled, kd=student["kd"] | {"temperature": 6.0}),
        dataclasses.replace(distilled, teachers=(other,)),
        dataclasses.replace(distilled, teachers=(path, other)),
        dataclasses.replace(teacher, label_smoothing=0.1),
        dataclasses.replace(teacher, class_weights="balanced"),
        dataclasses.replace(teacher, augmentation="shifts"),
    ]
    keys = [key(recipe, root) for recipe in varied]
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(module, "code_digest", lambda packages: "edited")
    assert key(teacher, root) not in keys
    torch.set_num_threads(1)


def test_seeds_of_one_setting_share_its_name(teacher: Recipe, tmp_path: Path):
    root = tmp_path / "root"
    paths = [train(dataclasses.replace(teacher, seed=seed), root, lambda record: None) for seed in (0, 1)]
    kd = {"temperature": 5.0, "alpha": 0.7, "divergence": "forward"}
    students = [
        train(dataclasses.replace(teacher, model="s", seed=seed, kd=kd, teachers=(path,)), root, lambda record: None)
        for seed, path in enumerate(paths)
    ]
    for checkpoints in (paths, students):
        descriptions = [read_description(path) for path in checkpoints]
        assert descriptions[0].setting == descriptions[1].setting
        assert descriptions[0].digest != descriptions[1].digest
    assert read_description(students[1]).teachers_md5 == [md5(paths[1])]


KD = {"temperature": 5.0, "alpha": 0.7, "divergence": "forward"}


def test_the_teachers_answer_to_a_view_is_that_to_the_image_shifted(teacher: Recipe, tmp_path: Path):
    path = train(teacher, tmp_path / "root", lambda record: None)
    augmented = dataclasses.replace(teacher, kd=KD, teachers=(path,), augmentation="shifts")
    images, device = load_split(teacher.data, "train", torch.device("cpu")).images[:20], torch.device("cpu")
    logits = module._teacher_logits(augmented, device, images, view_indices("shifts", 8, 8)).unflatten(0, (20, 9))
    classifier, _ = load_checkpoint(path, device)
    assert torch.equal(logits[:, 0], predict(classifier, images))
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge"))
    torch.testing.assert_close(logits[:, 1], predict(classifier, padded[:, 2:10, 4:12]))


def test_an_ensemble_is_the_mean_of_its_probabilities(teacher: Recipe, tmp_path: Path):
    paths = tuple(train(dataclasses.replace(teacher, seed=seed), tmp_path / "root", lambda record: None) for seed in (0, 1))
    images, device = load_split(teacher.data, "val", torch.device("cpu")).images, torch.device("cpu")
    logits = module._teacher_logits(dataclasses.replace(teacher, teachers=paths), device, images, None)
    expected = sum(predict(load_checkpoint(path, device)[0], images).softmax(1) for path in paths) / 2
    torch.testing.assert_close(logits.softmax(1), expected)


def test_every_part_of_a_recipe_trains_resumes_and_gives_the_same_bytes(npz: Path, tmp_path: Path):
    images = np.load(npz)["train_images"]
    write_npz(tmp_path / "more.npz", unlabelled_images=images[:90, ::-1])
    prepare(read_source(str(tmp_path / "more.npz")), 0.1, tmp_path / "more")
    options = {"schedule": "one_cycle", "weight_decay": 0.01, "selection": "auc"}
    strong = {"augmentation": "flips_and_shifts", "label_smoothing": 0.1, "class_weights": "balanced", "label_fraction": 0.3}
    big = Recipe("teacher", "simple_cnn", {}, SETTINGS | options, 0, tmp_path / "more", "cpu", **strong)
    small = dataclasses.replace(
        big, model="student_distilled", kd=KD, teachers=(train(big, tmp_path / "root", lambda record: None),)
    )

    def interrupt(record: Record) -> None:
        if len(record.history) == 1:
            raise KilledError

    with pytest.raises(KilledError):
        train(small, tmp_path / "root", interrupt)
    path = train(small, tmp_path / "root", lambda record: None)
    assert path.read_bytes() == train(small, tmp_path / "other", lambda record: None).read_bytes()
    description = read_description(path)
    assert description.val_images == sum(max(1, round(0.3 * count)) for count in np.bincount(np.load(npz)["val_labels"].ravel()))
    assert all(0 < epoch.val_auc <= 1 for epoch in description.history)


def test_a_training_without_validation_images_keeps_its_last_epoch(tmp_path: Path):
    write_npz(tmp_path / "a.npz", val_images=None, val_labels=None)
    prepare(read_source(str(tmp_path / "a.npz")), 0, tmp_path / "data")
    settings = SETTINGS | {"selection": "last"}
    path = train(
        Recipe("teacher", "simple_cnn", {}, settings, 0, tmp_path / "data", "cpu"), tmp_path / "root", lambda record: None
    )
    description = read_description(path)
    assert (description.best_epoch, description.val_images, description.chance, description.best()) == (2, 0, 0, (0, 0))


def test_images_are_not_mirrored_where_that_changes_their_meaning(tmp_path: Path):
    prepare(read_source("mnist5k"), 0.1, tmp_path / "data")
    recipe = Recipe("teacher", "simple_cnn", {}, SETTINGS, 0, tmp_path / "data", "cpu", augmentation="flips_and_shifts")
    with pytest.raises(UserError, match="mnist5k mean something else when mirrored: take shifts"):
        train(recipe, tmp_path / "root", lambda record: None)
