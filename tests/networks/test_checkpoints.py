import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.core.errors import UserError
from pipeline.data.prepared import TrainingData
from pipeline.networks.checkpoints import load_checkpoint, load_initial_weights, new_classifier, save_checkpoint
from pipeline.networks.description import Description, Epoch, checkpoint_path, checkpoints_in, read_description
from pipeline.networks.inference import predict

CPU = torch.device("cpu")
ARGUMENTS = {"width": 8, "hidden": 32}


@pytest.fixture
def described(data: TrainingData) -> Description:
    epoch = Epoch(train_loss=0.1, train_accuracy=0.9, val_loss=0.2, val_accuracy=0.8)
    return Description(
        format=3,
        digest="0" * 32,
        setting="1" * 32,
        model="teacher",
        architecture="compact_cnn",
        arguments=ARGUMENTS,
        dataset=data.dataset,
        seed=3,
        parameters={"kd.temperature": 5.0},
        device="cpu",
        history=[epoch],
        best_epoch=1,
        chance=0.1,
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, data: TrainingData, described: Description):
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3)
    save_checkpoint(tmp_path / "a.safetensors", classifier, described)
    loaded, description = load_checkpoint(tmp_path / "a.safetensors", CPU)
    assert description == read_description(tmp_path / "a.safetensors") == described
    assert described.best() == (0.8, -0.2)
    assert torch.equal(predict(loaded, data.val.images), predict(classifier, data.val.images))


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path, data: TrainingData, described: Description):
    for name in ("a", "b"):
        classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3)
        save_checkpoint(tmp_path / f"{name}.safetensors", classifier.to(memory_format=torch.channels_last), described)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def rewrite(path: Path, change_tensors=lambda tensors: None, change_description=lambda description: None) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = json.loads(file.metadata()["description"])
    change_tensors(tensors)
    change_description(description)
    save_file(tensors, path, {"description": json.dumps(description)})


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: save_file({"weight": torch.zeros(3)}, path),
        lambda path: rewrite(path, lambda tensors: tensors.pop("fc2.bias")),
        lambda path: rewrite(path, lambda tensors: tensors.update({"fc2.bias": torch.zeros(11)})),
        lambda path: rewrite(path, lambda tensors: tensors.update({"extra": torch.zeros(1)})),
        lambda path: rewrite(path, change_description=lambda d: d["arguments"].update(width=9)),
        lambda path: rewrite(path, change_description=lambda d: d["arguments"].update(depth=9)),
        lambda path: rewrite(path, change_description=lambda d: d.update(architecture="vgg")),
        lambda path: rewrite(path, change_description=lambda d: d["dataset"]["classes"].append("another")),
        lambda path: rewrite(path, change_description=lambda d: d.pop("history")),
        lambda path: rewrite(path, change_description=lambda d: d.update(best_epoch=2)),
        lambda path: rewrite(path, change_description=lambda d: d.update(format=2)),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, data: TrainingData, described: Description, break_it):
    path = tmp_path / "seed3.safetensors"
    save_checkpoint(path, new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3), described)
    break_it(path)
    with pytest.raises(UserError, match=r"seed3\.safetensors"):
        load_checkpoint(path, CPU)


def test_a_full_disk_leaves_the_old_checkpoint_alone(
    tmp_path: Path, data: TrainingData, described: Description, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "seed3.safetensors"
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3)
    save_checkpoint(path, classifier, described)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, classifier, described.model_copy(update={"seed": 4}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_are_listed_by_seed(tmp_path: Path):
    for seed in (10, 9, 0, "0 (copy)"):
        checkpoint_path(tmp_path, seed).touch()
    assert [path.stem for path in checkpoints_in(tmp_path)] == ["seed0", "seed9", "seed10"]
    with pytest.raises(UserError, match="elsewhere"):
        checkpoints_in(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"", None])
def test_initial_weights_that_are_damaged_or_missing_are_refused(tmp_path: Path, content: bytes | None):
    path = tmp_path / "resnet18.safetensors"
    save_file({"conv1.weight": torch.ones(2, 3)}, path)
    assert torch.equal(load_initial_weights(path)["conv1.weight"], torch.ones(2, 3))
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"resnet18\.safetensors"):
        load_initial_weights(path)
