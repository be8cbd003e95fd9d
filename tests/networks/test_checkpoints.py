import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.core.errors import UserError
from pipeline.data.prepared import TrainingData
from pipeline.networks.checkpoints import load_checkpoint, load_initial_weights, new_classifier, save_checkpoint
from pipeline.networks.description import checkpoint_path, checkpoints_in, read_description
from pipeline.networks.inference import predict
from tests.networks.conftest import ARGUMENTS, describe

CPU = torch.device("cpu")
Change = Callable[[dict], object]


@pytest.fixture
def path(tmp_path: Path, data: TrainingData) -> Path:
    """A checkpoint."""
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3)
    save_checkpoint(tmp_path / "seed3.safetensors", classifier, describe(data.dataset))
    return tmp_path / "seed3.safetensors"


def test_a_checkpoint_comes_back_as_it_was(path: Path, data: TrainingData):
    loaded, description = load_checkpoint(path, CPU)
    assert description == read_description(path) == describe(data.dataset)
    assert description.best() == (0.8, -0.2)
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3)
    assert torch.equal(predict(loaded, data.val.images), predict(classifier, data.val.images))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf", "swin_v2_t"])
def test_a_checkpoint_of_torchvisions_networks_comes_back_as_it_was(name: str, data: TrainingData, tmp_path: Path):
    dataset = data.dataset.model_copy(update={"image_shape": (32, 32, 1)})
    classifier = new_classifier(name, {}, dataset, 3)
    images = torch.randint(0, 256, (6, 32, 32, 1), dtype=torch.uint8)
    classifier.train()(images)  # which changes the statistics of batch norm
    described = describe(dataset).model_copy(update={"architecture": name, "arguments": {}})
    save_checkpoint(tmp_path / "seed3.safetensors", classifier, described)
    loaded, description = load_checkpoint(tmp_path / "seed3.safetensors", CPU)
    assert description == described
    expected = classifier.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    # To rounding: tensors in a file lie elsewhere in memory, which decides the order of some sums.
    torch.testing.assert_close(predict(loaded, images), predict(classifier, images), atol=1e-6, rtol=1e-6)


def test_equal_checkpoints_have_equal_bytes(path: Path, data: TrainingData):
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 3).to(memory_format=torch.channels_last)
    save_checkpoint(path.with_stem("again"), classifier, describe(data.dataset))
    assert path.with_stem("again").read_bytes() == path.read_bytes()


def rewrite(path: Path, tensors: Change = lambda tensors: None, description: Change = lambda description: None) -> None:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["description"])
    content = load_file(path)
    tensors(content)
    description(described)
    save_file(content, path, {"description": json.dumps(described)})


def name_architecture(path: Path, name: str, **arguments: object) -> None:
    rewrite(path, description=lambda description: description.update(architecture=name, arguments=arguments))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: save_file({"weight": torch.zeros(3)}, path),
        lambda path: rewrite(path, tensors=lambda tensors: tensors.pop("fc2.bias")),
        lambda path: rewrite(path, tensors=lambda tensors: tensors.update({"fc2.bias": torch.zeros(11)})),
        lambda path: rewrite(path, tensors=lambda tensors: tensors.update({"fc2.bias": torch.zeros(10, dtype=torch.int32)})),
        lambda path: rewrite(path, tensors=lambda tensors: tensors.update({"extra": torch.zeros(1)})),
        lambda path: rewrite(path, description=lambda description: description["arguments"].update(width=9)),
        lambda path: rewrite(path, description=lambda description: description["arguments"].update(depth=9)),
        *(functools.partial(name_architecture, name=name) for name in ("vgg", "regnet_y_128gf", "raft_small", "__class__")),
        lambda path: name_architecture(path, "vit_h_14", image_size=[60_000, 60_000]),
        lambda path: rewrite(path, description=lambda description: description["dataset"]["classes"].append("another")),
        lambda path: rewrite(path, description=lambda description: description.pop("history")),
        lambda path: rewrite(path, description=lambda description: description.update(best_epoch=2)),
        lambda path: rewrite(path, description=lambda description: description.update(format=2)),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(path: Path, damage: Callable[[Path], None]):
    damage(path)
    with pytest.raises(UserError, match=r"seed3\.safetensors"):
        load_checkpoint(path, CPU)


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
