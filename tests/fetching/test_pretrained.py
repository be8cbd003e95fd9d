import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import WeightsEnum, densenet121, get_model_weights, googlenet, mobilenet_v3_small, resnet18

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.fetching.pretrained import imagenet_weights
from pipeline.networks.architectures import build, load_initial
from tests.fetching.conftest import Host


@pytest.fixture
def stand_in(no_mirror: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Tensor]], Path]:
    """Makes a file that torchvision's default weights of `name` are said to be, on `host` and in the mirror; its path there."""

    def make(name: str, state: dict[str, Tensor]) -> Path:
        torch.save(state, stream := io.BytesIO())
        content = stream.getvalue()
        path = no_mirror / f"mirror/hub/checkpoints/{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        weights: WeightsEnum = get_model_weights(name).DEFAULT
        changed = type(weights.value)(**{**vars(weights.value), "url": f"{host.address}/{path.name}"})
        monkeypatch.setattr(weights, "_value_", changed)
        host.files[path.name] = content
        write_atomic(path, content)
        monkeypatch.setenv("DATA_MIRROR", "mirror")
        return path

    return make


def test_imagenet_weights_are_fetched_hash_checked_and_lose_their_head(stand_in, host: Host):
    state = resnet18().state_dict()
    path = stand_in("resnet18", state)
    content = path.read_bytes()
    path.unlink()
    for _ in ("from the host", "from the mirror"):
        weights = imagenet_weights("resnet18")
        assert len(host.asked) == 1
        assert set(state) - set(weights) == {"fc.weight", "fc.bias"}
        assert torch.equal(weights["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
        path.write_bytes(content)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{path.name}.*sha256"):
        imagenet_weights("resnet18")


def test_files_of_older_versions_are_read_and_the_second_loss_is_left_out(stand_in):
    state = densenet121().state_dict()
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): tensor for key, tensor in state.items()}
    stand_in("densenet121", {key: tensor for key, tensor in old.items() if "num_batches" not in key})
    weights = imagenet_weights("densenet121")
    assert set(state) - set(weights) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in weights.items())
    stand_in("googlenet", googlenet(init_weights=False).state_dict())
    load_initial(build("googlenet", in_channels=3, image_size=(28, 28), num_classes=2), imagenet_weights("googlenet"))


def test_a_file_that_lacks_weights_is_refused(stand_in):
    state = mobilenet_v3_small().state_dict()
    del state["features.1.block.0.0.weight"]
    path = stand_in("mobilenet_v3_small", state)
    with pytest.raises(UserError, match=rf"{path.name}: lacks features\.1\.block\.0\.0\.weight"):
        imagenet_weights("mobilenet_v3_small")


@pytest.mark.parametrize("name", ["simple_cnn", "compact_cnn", "resnet81", "fasterrcnn_resnet50_fpn"])
def test_what_has_no_such_weights_is_refused_by_name(name: str):
    with pytest.raises(UserError, match=f"pretrained.*{name}|unknown architecture '{name}'"):
        imagenet_weights(name)
