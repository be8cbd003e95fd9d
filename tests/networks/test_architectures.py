import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, mobilenet_v3_small, resnet18

from pipeline.core.errors import UserError, one_line
from pipeline.networks.architectures import ARCHITECTURES, Classifier, build, build_meta, check_architecture, load_initial
from pipeline.networks.names import OPTIONS, WITHOUT_DROPOUT, architecture_arguments
from pipeline.networks.torchvision_models import classifier_names, first_convolution

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


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_networks_that_may_share_a_process_draw_nothing_when_they_train(name: str):
    network = build(name, **architecture_arguments(name, {"width": 4, "hidden": 8, "stem": "imagenet"}), **COLOUR).train()
    before = torch.get_rng_state()
    network(torch.rand(2, 3, 28, 28, generator=torch.Generator())).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_the_stem_decides_how_far_images_shrink(stem: str, side: int):
    model = build("resnet18", stem=stem, **COLOUR).eval()
    shapes = []
    model.layer4.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 9)
    assert shapes[0][2:] == (side, side)


@pytest.mark.parametrize(("name", "side"), [("resnet18", 28), ("resnet18", 40), ("resnet50", 28), ("resnet34", 17)])
def test_a_resnet_trains_as_torchvisions_also_where_its_last_block_sees_a_single_pixel(name: str, side: int):
    ours = build(name, stem="imagenet", **COLOUR | {"image_size": (side, side)}).double().to(memory_format=torch.channels_last)
    theirs = get_model(name, num_classes=9).double()
    theirs.load_state_dict(ours.state_dict())
    images, labels = torch.rand(4, 3, side, side, dtype=torch.float64), torch.arange(4)
    for model in (ours, theirs):
        F.cross_entropy(model(images), labels).backward()
    for (key, our), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad, msg=lambda text, key=key: f"{key}: {text}", check_stride=False)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


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


def test_the_cifar_stem_stays_random():
    colour, cifar = (build("resnet18", stem=stem, **COLOUR) for stem in ("imagenet", "cifar"))
    stem = cifar.conv1.weight.clone()
    load_initial(cifar, {key: tensor for key, tensor in colour.state_dict().items() if not key.startswith("fc.")})
    assert torch.equal(cifar.layer3[0].conv1.weight, colour.layer3[0].conv1.weight)
    assert torch.equal(cifar.conv1.weight, stem)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "swin_t", "googlenet"])
def test_a_grey_image_gives_what_it_gives_in_three_channels(name: str):
    torch.manual_seed(0)
    size = {"image_size": (64, 64), "num_classes": 4} | architecture_arguments(name, {"stem": "imagenet"})
    grey, colour = (build(name, in_channels=channels, **size).eval() for channels in (1, 3))
    load_initial(grey, colour.state_dict())
    image = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_initial_weights_that_fit_nowhere_are_refused():
    with pytest.raises(UserError, match="nowhere"):
        load_initial(build("simple_cnn", **COLOUR), {"nowhere": torch.zeros(1)})
    big, small = (build_meta("vit_b_32", in_channels=3, image_size=(side, side), num_classes=2) for side in (224, 64))
    with pytest.raises(UserError, match=r"encoder.pos_embedding is of shape \(1, 50, 768\), there \(1, 5, 768\)"):
        load_initial(small, big.state_dict())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_seed_gives_resnet18_the_weights_it_always_gave(stem: str, channels: int):
    torch.manual_seed(0)
    model = resnet18(num_classes=9)
    kernel = {"kernel_size": 7, "stride": 2, "padding": 3} if stem == "imagenet" else {"kernel_size": 3, "padding": 1}
    model.conv1 = nn.Conv2d(channels, 64, bias=False, **kernel)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    expected, following = model.state_dict(), torch.rand(1)
    torch.manual_seed(0)
    actual = build("resnet18", stem=stem, **(COLOUR | {"in_channels": channels})).state_dict()
    assert torch.equal(torch.rand(1), following)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


NEAREST = dict.fromkeys(("resnet81", "ResNet18", "quantized_resnet18"), "resnet18") | {"mobilenetv3_small": "mobilenet_v3_small"}
NEAREST |= dict.fromkeys(("", "x" * 10**6, "__class__", "get_model", "raft_small"), "")


@pytest.mark.parametrize(("name", "nearest"), NEAREST.items())
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str):
    with pytest.raises(UserError, match=rf"the nearest of the \d\d known is \w*{nearest}") as caught:
        build(name, **COLOUR)
    assert len(str(caught.value)) < 250


def test_an_architecture_gets_its_own_options():
    options = {"width": 8, "hidden": 4, "stem": "cifar"}
    for name in (*ARCHITECTURES, "mobilenet_v3_small"):
        build_meta(name, **architecture_arguments(name, options), **GREY)
    assert set(OPTIONS) <= set(ARCHITECTURES)
    assert architecture_arguments("compact_cnn", options) == {"width": 8, "hidden": 4}


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mobilenet_v3_small", (64, 64, 1)), ("mobilenet_v3_small", (28, 28, 3)), ("vit_b_16", (64, 64, 3)), ("vgg11", (32, 40, 3))],
)
def test_a_network_that_takes_the_images_passes(name: str, shape: tuple[int, int, int]):
    check_architecture(name, {}, shape, 9)


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("vgg11", {}, (28, 28, 1), "vgg11 cannot take images of 28x28; .*32x32"),
        ("maxvit_t", {}, (64, 64, 1), "224x224"),
        ("vit_b_16", {}, (28, 28, 3), "32x32.*indivisible by patch size"),
        ("vit_b_16", {}, (32, 64, 3), "32x64; .*32x32.*Wrong image width"),
        ("compact_cnn", {"width": 4, "hidden": 8}, (4, 9, 1), "4x9; .*28x28"),
        ("mobilenet_v3_small", {}, (64, 64, 2), "1 or 3 channels, not 2"),
        ("mobilenet_v3_small", {"stem": "cifar"}, (64, 64, 3), "cannot be built.*unexpected keyword argument 'stem'"),
        ("resnet34", {"stem": ["cifar"]}, (28, 28, 3), "resnet34 cannot be built"),
        ("resnet34", {}, (28, 28, 3), "resnet34 cannot be built"),
        ("mobilenet", {}, (64, 64, 3), "nearest.*mobilenet_v2"),
    ],
)
def test_a_network_that_does_not_take_the_images_is_refused_in_one_line(
    name: str, arguments: dict, shape: tuple[int, int, int], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        check_architecture(name, arguments, shape, 9)
    assert one_line(caught.value) == str(caught.value)


def classifiers(*names: str) -> list:
    """Each of torchvision's; all but `names` are slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in classifier_names()]


@pytest.mark.parametrize("name", classifiers("mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf", "swin_v2_t"))
def test_every_classifier_can_be_built_without_memory_for_grey_images(name: str):
    arguments = architecture_arguments(name, {"stem": "imagenet"})
    check_architecture(name, arguments, (224, 224, 1), 9)
    network = build_meta(name, **arguments, **(GREY | {"image_size": (224, 224)}))
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
    assert network.get_submodule(first_convolution(network)).in_channels == 1


def test_other_networks_keep_torchvisions_first_weights():
    torch.manual_seed(0)
    expected = mobilenet_v3_small(num_classes=9).state_dict()
    torch.manual_seed(0)
    actual = build("mobilenet_v3_small", **COLOUR).state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
