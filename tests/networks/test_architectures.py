import pytest
import torch
import torch.nn.functional as F

from pipeline.core.errors import UserError
from pipeline.networks.architectures import Classifier, build, load_initial

GREY = {"in_channels": 1, "image_size": (28, 28), "num_classes": 10}
COLOUR = {"in_channels": 3, "image_size": (28, 28), "num_classes": 9}


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("compact_cnn", {"width": 32, "hidden": 128, **GREY}, 1_199_882),  # the original course project's teacher
        ("compact_cnn", {"width": 16, "hidden": 64, **GREY}, 300_426),  # the original course project's student
        ("simple_cnn", COLOUR, 896 + 18_496 + 401_536 + 1_161),
        ("resnet18", {"stem": "imagenet", **COLOUR}, 11_689_512 - 513_000 + 512 * 9 + 9),  # torchvision's, less its head
    ],
)
def test_sizes_are_the_original_projects(name: str, arguments: dict, parameters: int):
    assert sum(tensor.numel() for tensor in build(name, **arguments).parameters()) == parameters


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_the_stem_decides_how_far_images_shrink(stem: str, side: int):
    model = build("resnet18", stem=stem, **COLOUR).eval()
    shapes = []
    model.layer4.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 9)
    assert shapes[0][2:] == (side, side)


@pytest.mark.parametrize("side", [28, 64, 128, 224])
@pytest.mark.parametrize(
    ("name", "arguments"), [("simple_cnn", {}), ("resnet18", {"stem": "imagenet"}), ("compact_cnn", {"width": 4, "hidden": 8})]
)
def test_the_networks_take_every_size_of_medmnist(name: str, arguments: dict, side: int):
    model = build(name, **arguments, **(COLOUR | {"image_size": (side, side)}))
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 9)


def test_a_classifier_scales_raw_images():
    images = torch.randint(0, 256, (5, 28, 28, 3), dtype=torch.uint8)
    scaled = Classifier(torch.nn.Identity(), 0.1307, 0.3081)(images)
    torch.testing.assert_close(scaled, (images.permute(0, 3, 1, 2) / 255 - 0.1307) / 0.3081, check_stride=False)


def test_grey_images_get_the_sum_of_pretrained_colour_filters_and_the_cifar_stem_stays_random():
    colour = build("resnet18", stem="imagenet", **COLOUR)
    grey = build("resnet18", stem="imagenet", **GREY)
    cifar = build("resnet18", stem="cifar", **COLOUR)
    stem = cifar.conv1.weight.clone()
    for model in (grey, cifar):
        load_initial(model, {key: tensor for key, tensor in colour.state_dict().items() if not key.startswith("fc.")})
        assert torch.equal(model.layer3[0].conv1.weight, colour.layer3[0].conv1.weight)
    assert torch.equal(cifar.conv1.weight, stem)
    image = torch.randn(2, 1, 28, 28)
    expected = F.conv2d(image.expand(-1, 3, -1, -1), colour.conv1.weight, stride=2, padding=3)
    torch.testing.assert_close(F.conv2d(image, grey.conv1.weight, stride=2, padding=3), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_that_fit_nowhere_and_an_unknown_architecture_are_refused():
    with pytest.raises(UserError, match="nowhere"):
        load_initial(build("simple_cnn", **COLOUR), {"nowhere": torch.zeros(1)})
    with pytest.raises(UserError, match="vgg"):
        build("vgg", **COLOUR)
