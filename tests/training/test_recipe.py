import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.augmentation import view_indices
from pipeline.data.prepared import Split, load_split
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import read_description
from pipeline.networks.inference import predict
from pipeline.training import recipe as module
from pipeline.training.answers import answers, permuted
from pipeline.training.cache import Record, read_record
from pipeline.training.losses import METHODS
from pipeline.training.recipe import Recipe, check_method, train
from tests.conftest import digits, prepare_npz
from tests.training.conftest import KD, SETTINGS, trained


def key(recipe: Recipe, root: Path) -> str:
    return read_description(trained(recipe, root)).digest


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


class KilledError(Exception):
    pass


def interrupt(recipe: Recipe, root: Path) -> None:
    """Train until the first epoch is over."""

    def kill(record: Record) -> None:
        if len(record.history) == 1:
            raise KilledError

    with pytest.raises(KilledError):
        train(recipe, root, kill)


def resumed(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint of a training that was interrupted, whose bytes must be those of one that was not."""
    interrupt(recipe, folder / "root")
    path = trained(recipe, folder / "root")
    assert path.read_bytes() == trained(recipe, folder / "other").read_bytes()
    return path


def test_an_interrupted_training_resumes_after_its_last_epoch(teacher: Recipe, tmp_path: Path):
    interrupt(teacher, tmp_path / "root")
    seen = []
    path = train(teacher, tmp_path / "root", lambda record: seen.append(len(record.history)))
    assert seen == [1, 2, 2]
    assert len(read_record(tmp_path / "root", path.parent.name).loads) == 2


def test_the_digest_changes_with_whatever_decides_the_training(teacher: Recipe, tmp_path: Path, monkeypatch):
    root = tmp_path / "root"
    path = trained(teacher, root)
    other = trained(dataclasses.replace(teacher, seed=1), root)
    distilled = dataclasses.replace(teacher, method=KD, model="student_distilled", teachers=(path,))
    prepare_npz(tmp_path / "more", val_images=None, val_labels=None)
    changes = [
        {},
        {"seed": 1},
        {"data": tmp_path / "more"},
        {"threads": 2},
        {"label_fraction": 0.5},
        {"settings": SETTINGS | {"lr": 0.02}},
        {"arguments": {"width": 5, "hidden": 8}},
        {"label_smoothing": 0.1},
        {"class_weights": "balanced"},
        {"augmentation": "shifts"},
    ]
    of_distilled = [{}, {"method": KD | {"temperature": 6.0}}, {"teachers": (other,)}, {"teachers": (path, other)}]
    varied = [dataclasses.replace(teacher, **change) for change in changes]
    varied += [dataclasses.replace(distilled, **change) for change in of_distilled]
    keys = [key(recipe, root) for recipe in varied]
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(module, "code_digest", lambda packages: "edited")
    assert key(teacher, root) not in keys
    torch.set_num_threads(1)


def test_seeds_of_one_setting_share_its_name(teacher: Recipe, tmp_path: Path):
    root = tmp_path / "root"
    paths = [trained(dataclasses.replace(teacher, seed=seed), root) for seed in (0, 1)]
    students = [
        trained(dataclasses.replace(teacher, model="s", seed=seed, method=KD, teachers=(path,)), root)
        for seed, path in enumerate(paths)
    ]
    for checkpoints in (paths, students):
        descriptions = [read_description(path) for path in checkpoints]
        assert descriptions[0].setting == descriptions[1].setting
        assert descriptions[0].digest != descriptions[1].digest
    assert read_description(students[1]).teachers_md5 == [md5(paths[1])]


def test_the_teachers_answer_to_a_view_is_that_to_the_image_shifted(teacher: Recipe, tmp_path: Path):
    path = trained(teacher, tmp_path / "root")
    augmented = dataclasses.replace(teacher, method=KD, teachers=(path,), augmentation="shifts")
    images, device = load_split(teacher.data, "train", torch.device("cpu")).images[:20], torch.device("cpu")
    logits = answers(augmented, device, Split(images, torch.zeros(20, dtype=int)), view_indices("shifts", 8, 8), False)
    logits = logits.unflatten(0, (20, 9))
    classifier, _ = load_checkpoint(path, device)
    assert torch.equal(logits[:, 0], predict(classifier, images))
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge"))
    torch.testing.assert_close(logits[:, 1], predict(classifier, padded[:, 2:10, 4:12]))


def test_an_ensemble_is_the_mean_of_its_probabilities(teacher: Recipe, tmp_path: Path):
    paths = tuple(trained(dataclasses.replace(teacher, seed=seed), tmp_path / "root") for seed in (0, 1))
    device = torch.device("cpu")
    val = load_split(teacher.data, "val", device)
    logits = answers(dataclasses.replace(teacher, teachers=paths), device, val, None, False)
    expected = sum(predict(load_checkpoint(path, device)[0], val.images).softmax(1) for path in paths) / 2
    torch.testing.assert_close(logits.softmax(1), expected)


def test_every_part_of_a_recipe_trains_resumes_and_gives_the_same_bytes(tmp_path: Path):
    prepare_npz(tmp_path / "more", unlabelled_images=digits(90)[0][:, ::-1])
    options = {"schedule": "one_cycle", "weight_decay": 0.01, "selection": "auc"}
    strong = {"augmentation": "flips_and_shifts", "label_smoothing": 0.1, "class_weights": "balanced", "label_fraction": 0.3}
    big = Recipe("teacher", "simple_cnn", {}, SETTINGS | options, 0, tmp_path / "more", "cpu", **strong)
    small = dataclasses.replace(big, model="student_distilled", method=KD, teachers=(trained(big, tmp_path / "root"),))
    description = read_description(resumed(small, tmp_path))
    assert description.val_images == sum(max(1, round(0.3 * count)) for count in np.bincount(digits(500)[1][400:]))
    assert all(0 < epoch.val_auc <= 1 for epoch in description.history)


def test_a_training_without_validation_images_keeps_its_last_epoch(tmp_path: Path):
    prepare_npz(tmp_path / "data", 0, val_images=None, val_labels=None)
    settings = SETTINGS | {"selection": "last"}
    path = trained(Recipe("teacher", "simple_cnn", {}, settings, 0, tmp_path / "data", "cpu"), tmp_path / "root")
    description = read_description(path)
    assert (description.best_epoch, description.val_images, description.chance, description.best()) == (2, 0, 0, (0, 0))


def test_images_are_not_mirrored_where_that_changes_their_meaning(tmp_path: Path):
    prepare(read_source("mnist5k"), 0.1, tmp_path / "data")
    recipe = Recipe("teacher", "simple_cnn", {}, SETTINGS, 0, tmp_path / "data", "cpu", augmentation="flips_and_shifts")
    with pytest.raises(UserError, match="mnist5k mean something else when mirrored: take shifts"):
        trained(recipe, tmp_path / "root")


DKD = {"name": "dkd", "weight": 1, "alpha": 1, "beta": 8, "temperature": 4, "warm_up": 0.5, "logit_standardization": True}
RKD = {"name": "rkd", "weight": 1, "distance": 25, "angle": 50}
DIST = {"name": "dist", "weight": 1, "beta": 2, "gamma": 2, "temperature": 4}
WTTM = {"name": "wttm", "weight": 1, "beta": 4, "gamma": 0.2}
HALF = {"label_fraction": 0.5}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DKD, {}),
        (DIST, HALF),
        (WTTM, HALF),
        (RKD, HALF),
        (KD, HALF | {"answers": "permuted"}),
        (RKD, {"answers": "permuted"}),
        (KD, {"answers": "uniform"}),
        (KD, {"answers": "hard"}),
    ],
)
def test_every_method_and_control_trains_resumes_and_gives_the_same_bytes(method: dict, options: dict, teacher: Recipe, tmp_path):
    big = trained(dataclasses.replace(teacher, architecture="resnet18", arguments={"stem": "cifar"}), tmp_path)
    options |= {"augmentation": "shifts", "model": "student_distilled"}
    student = dataclasses.replace(teacher, method=method, teachers=(big,), **options)
    plain = trained(dataclasses.replace(student, method=KD, answers="teacher"), tmp_path / "root")
    assert resumed(student, tmp_path).read_bytes() != plain.read_bytes()


def test_a_method_is_a_function(teacher: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def agree(hard, weight):
        return lambda logits, labels, done, said: {"apart": weight * (logits.softmax(1) - said.softmax(1)).abs().mean()}

    monkeypatch.setitem(METHODS, "agree", agree)
    paths = (trained(teacher, tmp_path / "root"),)
    student = dataclasses.replace(teacher, method={"name": "agree", "weight": 3.0}, teachers=paths)
    first, last = read_description(trained(student, tmp_path / "root")).history
    assert first.terms["apart"] > last.terms["apart"] > 0


@pytest.mark.parametrize(
    ("method", "options", "wrong"),
    [
        (DKD, {"data": "two"}, "dkd wants three classes or more: of two, it is dkd.alpha times kd"),
        (KD | {"logit_standardization": True}, {"data": "two"}, "logit_standardization wants three classes or more"),
        (DKD, HALF, "dkd wants the label of every training image"),
        (RKD, {"teachers": (Path("a"), Path("b"))}, "rkd wants one network's embeddings"),
        (RKD, {"teachers": (Path("seed0.npz"),)}, "rkd wants one network's embeddings"),
        (RKD, {"settings": SETTINGS | {"batch_size": 513}}, "rkd wants batches of at most 512 images"),
        (RKD, HALF | {"answers": "permuted"}, "rkd, permuted, wants the label of every training image"),
        (WTTM, {"answers": "hard"}, "uniform and hard answers want kd"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused_in_a_line(
    method: dict, options: dict, wrong: str, teacher: Recipe, tmp_path: Path
):
    if "data" in options:
        labels = {
            f"{split}_labels": np.arange(count)[:, None] % 2 for split, count in (("train", 400), ("val", 100), ("test", 200))
        }
        prepare_npz(tmp_path / "two", **labels)
        options = {"data": tmp_path / "two"}
    check_method(dataclasses.replace(teacher, method=KD))
    with pytest.raises(UserError, match=wrong):
        trained(dataclasses.replace(teacher, method=method, **options), tmp_path / "root")


def test_permuted_answers_stay_within_a_class_and_keep_their_views():
    labels = torch.tensor([0, 0, 1, 1, 1, 0, -1, -1])
    named = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])  # what the teacher names: the class of an image without a label
    said = torch.stack([torch.arange(16.0) // 2, torch.arange(16) % 2], dim=1)  # the image, its view
    said[::2, 1], said[1::2, 1] = torch.where(named == 1, 100.0, -1.0), 7.0
    images = permuted(said, labels, 0).unflatten(0, (8, 2))
    assert (images[:, 0, 0] == images[:, 1, 0]).all()
    assert (images[:, 1, 1] == 7).all()
    classes = torch.where(labels < 0, named, labels)
    source = images[:, 0, 0].long()
    assert torch.equal(classes[source], classes)
    assert source.sort().values.tolist() == list(range(8))
    assert not torch.equal(permuted(said, labels, 1), permuted(said, labels, 0))
