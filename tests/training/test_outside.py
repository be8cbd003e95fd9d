"""Teachers from outside: what is refused, the linear probe, and what a student learns from."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.augmentation import view_indices
from pipeline.data.dataset import load_dataset
from pipeline.data.labels import known_labels
from pipeline.data.prepared import TrainingData, load_training_data
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import read_description
from pipeline.networks.inference import predict
from pipeline.networks.outside import read_outside, read_outside_logits
from pipeline.networks.write_logits import main as write_logits
from pipeline.training.answers import answers
from pipeline.training.outside import STRENGTHS, write_teachers
from pipeline.training.recipe import Recipe
from tests.conftest import digits, prepare_npz
from tests.training.conftest import KD, trained

CPU = torch.device("cpu")
UNLABELLED = digits(750)[0][700:]  # 50 images
RANDOM = np.random.default_rng(0)


@pytest.fixture
def prepared(teacher: Recipe) -> TrainingData:
    """The set in tmp_path / "data": 400 training, 100 validation, 200 test images."""
    return load_training_data(teacher.data, CPU)


def save(path: Path, data: TrainingData, kind: str = "logits", width: int = 10, **replaced: object) -> Path:
    """A file that fits `data`; arrays named here are replaced, None leaves one out."""
    arrays = {"fingerprint": data.dataset.fingerprint}
    for part, number in data.dataset.images.items():
        arrays[f"{part}_{kind}"] = RANDOM.normal(size=(number, width)).astype(np.float32)
    np.savez(path, **{name: array for name, array in (arrays | replaced).items() if array is not None})
    return path


def make(file: Path, data: TrainingData, kind: str = "logits", seeds: tuple[int, ...] = (0, 3), **options: object) -> Path:
    """The folder of teachers made of a file."""
    write_teachers(file, kind, data, folder := file.with_suffix(""), seeds, **options)
    return folder


ROWS, FEATURES = RANDOM.normal(size=(400, 10)), {"kind": "features"}


@pytest.mark.parametrize(
    ("replaced", "options", "message"),
    [
        ({"train_logits": None}, {}, "train_logits is missing"),
        ({"train_logits": ROWS[:399]}, {}, r"train_logits has shape \(399, 10\), not \(400, 10\): images, classes"),
        ({"train_logits": ROWS[:, :9]}, {}, r"train_logits has shape \(400, 9\), not \(400, 10\)"),
        ({"train_logits": ROWS[:, 0]}, {}, r"train_logits has shape \(400,\), not"),
        ({"train_logits": np.where(ROWS[7, 3] == ROWS, np.nan, ROWS)}, {}, "train_logits has a value that is no finite number"),
        ({"train_logits": ROWS * 1e300}, {}, "no finite number of float32"),
        ({"train_logits": ROWS.astype(int)}, {}, "train_logits has dtype int64, not one of floats"),
        ({"train_logits": np.array([object()])}, {}, "truncated, or not an .npz file of plain arrays"),
        ({"val_logits": ROWS[:99]}, {}, r"val_logits has shape \(99, 10\), not \(100, 10\)"),
        ({"test_logits": ROWS[:199]}, {}, r"test_logits has shape \(199, 10\), not \(200, 10\)"),
        ({"unlabelled_logits": ROWS}, {}, r"unlabelled_logits has shape \(400, 10\), not \(0, 10\)"),
        ({"fingerprint": None}, {}, "fingerprint is missing"),
        ({"fingerprint": "0" * 64}, {}, "fingerprint is 000000000000..., data/distillation/dataset.json has"),
        ({}, {"augmentation": "shifts"}, r"train_logits has shape \(400, 10\), not \(400, 9, 10\): images, views of the augment"),
        ({"train_logits": np.zeros((400, 9, 10))}, {}, r"train_logits has shape \(400, 9, 10\), not \(400, 10\)"),
        ({"val_features": None}, FEATURES, "val_features is missing"),
        ({"val_features": np.zeros((100, 6))}, FEATURES, r"val_features has shape \(100, 6\), not \(100, 10\)"),
        ({"train_features": np.zeros((400, 0))}, FEATURES, r"train_features has shape \(400, 0\)"),
        ({"test_features": np.full((200, 10), np.inf)}, FEATURES, "test_features has a value"),
        ({"val_features": np.full((100, 10), np.inf, np.float16)}, FEATURES, "val_features has a value"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    prepared: TrainingData, tmp_path: Path, replaced: dict, options: dict, message: str
):
    file = save(tmp_path / "bad.npz", prepared, options.get("kind", "logits"), **replaced)
    with pytest.raises(UserError, match=message) as caught:
        make(file, prepared, **options)
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bad").exists()


def test_every_seed_has_the_same_file_and_equal_input_gives_equal_bytes(prepared: TrainingData, tmp_path: Path):
    file = save(tmp_path / "a.npz", prepared, val_logits=None)
    folder = make(file, prepared, parameters={"teacher.logits": "a.npz"})
    assert sorted(path.name for path in folder.iterdir()) == ["seed0.npz", "seed3.npz"]
    contents = {path.read_bytes() for path in folder.iterdir()}
    make(file, prepared, parameters={"teacher.logits": "a.npz"})
    assert {path.read_bytes() for path in folder.iterdir()} == contents
    assert len(contents) == 1
    described, given = read_outside(folder / "seed3.npz"), np.load(file)
    assert (described.kind, described.file_md5, described.splits) == ("logits", md5(file), ["train", "test"])
    for split in described.splits:
        assert np.array_equal(read_outside_logits(folder / "seed0.npz", split, prepared.dataset), given[f"{split}_logits"])
    with pytest.raises(UserError, match="damaged, or made for other data"):
        read_outside_logits(folder / "seed0.npz", "val", prepared.dataset)
    (folder / "seed0.npz").write_bytes(next(iter(contents))[:-500])
    with pytest.raises(UserError, match="truncated"):
        read_outside(folder / "seed0.npz")


def pixels(data: TrainingData) -> dict[str, np.ndarray]:
    """Features: every third pixel and a constant."""
    features = {"train": data.train.images, "val": data.val.images}
    flat = {f"{part}_features": images.flatten(1).numpy()[:, ::3].astype(np.float32) for part, images in features.items()}
    return {name: np.pad(array, ((0, 0), (0, 1))) for name, array in flat.items()}


def test_the_probe_is_scikit_learns_regression_chosen_on_validation(prepared: TrainingData, tmp_path: Path):
    features = pixels(prepared)
    file = save(tmp_path / "f.npz", prepared, "features", **features, test_features=None)
    folder = make(file, prepared, "features", label_fraction=0.3)
    labels = {"train": prepared.train.labels.numpy(), "val": prepared.val.labels.numpy()}
    for seed in (0, 3):
        rows = {part: known_labels(torch.from_numpy(of), 0.3, seed).numpy() for part, of in labels.items()}
        scaler = StandardScaler().fit(features["train_features"][rows["train"]].astype(float))
        inputs = {part: scaler.transform(features[f"{part}_features"].astype(float)) for part in labels}
        losses = {}
        for c in STRENGTHS:
            probe = LogisticRegression(C=c, max_iter=500).fit(inputs["train"][rows["train"]], labels["train"][rows["train"]])
            answers = probe.predict_proba(inputs["val"][rows["val"]])
            losses[log_loss(labels["val"][rows["val"]], answers, labels=range(10))] = c, probe
        c, probe = losses[min(losses)]
        described = read_outside(path := folder / f"seed{seed}.npz")
        assert (described.kind, described.c, described.weights) == (
            "linear probe",
            c,
            10 * features["train_features"].shape[1] + 10,
        )
        for part in labels:
            logits = read_outside_logits(path, part, prepared.dataset)
            np.testing.assert_allclose(log_softmax(logits, 1), probe.predict_log_proba(inputs[part]), atol=1e-3)
    descriptions = [read_outside(folder / f"seed{seed}.npz") for seed in (0, 3)]
    assert descriptions[0].setting == descriptions[1].setting
    assert md5(folder / "seed0.npz") != md5(folder / "seed3.npz"), "the seeds see other labels"


def test_a_probe_of_two_classes_of_views_and_without_validation(tmp_path: Path):
    labels = digits(700)[1]
    two = {"train_labels": labels[:400, None] % 2, "test_labels": labels[500:, None] % 2, "val_labels": None, "val_images": None}
    prepare_npz(tmp_path / "two", 0, **two, unlabelled_images=UNLABELLED)
    data = load_training_data(tmp_path / "two", CPU)
    indices = view_indices("shifts", 8, 8)
    views = data.train.images.flatten(1)[:, indices].numpy().astype(np.float32)  # (450, 9, 64)
    parts = {"train_features": views[:400], "unlabelled_features": views[400:], "val_features": None, "test_features": None}
    folder = make(save(tmp_path / "f.npz", data, "features", **parts), data, "features", augmentation="shifts")
    logits = read_outside_logits(folder / "seed0.npz", "train", data.dataset)
    assert logits.shape == (450, 9, 2)
    assert (logits[:400, 0].argmax(1) == data.train.labels[:400].numpy()).mean() > 0.95
    assert read_outside(folder / "seed0.npz").c == 1
    with pytest.raises(UserError, match="unlabelled_features is missing"):
        make(save(tmp_path / "g.npz", data, "features", 4, unlabelled_features=None, val_features=None), data, "features")


@pytest.mark.parametrize("augmentation", ["none", "shifts"])
def test_the_written_logits_of_checkpoints_are_what_a_student_of_them_learns_from(
    teacher: Recipe, tmp_path: Path, augmentation: str
):
    prepare_npz(data := tmp_path / "more", unlabelled_images=UNLABELLED)
    teacher = dataclasses.replace(teacher, data=data)
    paths = [trained(dataclasses.replace(teacher, seed=seed), tmp_path / "root") for seed in (0, 1)]
    write_logits(data, tmp_path / "two.npz", paths, augmentation, "cpu")
    folder = make(tmp_path / "two.npz", load_training_data(data, CPU), augmentation=augmentation)
    student = dataclasses.replace(teacher, model="student_distilled", method=KD, augmentation=augmentation)
    of_networks, of_file = (dataclasses.replace(student, teachers=of) for of in (tuple(paths), (folder / "seed0.npz",)))
    train_split, indices = load_training_data(data, CPU).train, view_indices(augmentation, 8, 8)
    logits = [answers(recipe, CPU, train_split, indices, False) for recipe in (of_networks, of_file)]
    assert torch.equal(*logits)
    assert len(logits[0]) == 450 * (9 if augmentation == "shifts" else 1)
    first, second = (read_description(trained(recipe, tmp_path / "root")) for recipe in (of_networks, of_file))
    assert first.history == second.history
    assert first.digest != second.digest
    assert second.teachers_md5 == [md5(folder / "seed0.npz")]
    other = dataclasses.replace(of_file, augmentation="none" if augmentation == "shifts" else "shifts")
    with pytest.raises(UserError, match="not the views of augmentation"):
        trained(other, tmp_path / "root")


def test_the_writer_says_what_is_wrong_and_its_logits_are_the_models(teacher: Recipe, tmp_path: Path):
    path = trained(teacher, tmp_path / "root")
    with pytest.raises(UserError, match=r"the second argument, ends in \.npz"):
        write_logits(teacher.data, path, [path])
    labels = {f"{part}_labels": digits(n)[1] % 2 for part, n in (("train", 400), ("val", 100), ("test", 200))}
    prepare_npz(tmp_path / "two", **labels)
    with pytest.raises(UserError, match="trained on other classes"):
        write_logits(tmp_path / "two", tmp_path / "out.npz", [path], device="cpu")
    write_logits(teacher.data, tmp_path / "out.npz", [path], device="cpu")
    written, images = np.load(tmp_path / "out.npz"), load_training_data(teacher.data, CPU).val.images
    assert str(written["fingerprint"]) == load_dataset(teacher.data).fingerprint
    assert np.array_equal(written["val_logits"], predict(load_checkpoint(path, CPU)[0], images).numpy())
    shapes = {f"{split}_logits": (number, 10) for split, number in (("train", 400), ("val", 100), ("test", 200))}
    assert {name: written[name].shape for name in written.files if name != "fingerprint"} == shapes
