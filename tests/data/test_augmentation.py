import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data.augmentation import check_augmentation, single_view, view, view_indices


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_is_a_shift_of_the_image_or_of_its_mirror_image_with_the_border_repeated(channels: int):
    images = torch.randint(0, 256, (3, 6, 9, channels), dtype=torch.uint8)
    indices = view_indices("flips_and_shifts", 6, 9)
    assert len(indices) == 18
    assert torch.equal(single_view(0, indices)(images), images)
    expected = []
    for flipped in (images, images.flip(2)):
        padded = np.pad(flipped.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
        expected += [padded[:, 2 - down : 8 - down, 2 - right : 11 - right] for down in (0, -2, 2) for right in (0, -2, 2)]
    for number, wanted in enumerate(expected):
        mine = single_view(number, indices)(images).numpy()
        assert any(np.array_equal(mine, other) for other in expected)
        if number < 9:
            np.testing.assert_array_equal(mine, wanted)
    assert len({single_view(number, indices)(images).numpy().tobytes() for number in range(18)}) == 18


def test_every_image_gets_the_view_of_its_number():
    images = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)
    indices = view_indices("shifts", 8, 8)
    seen = view(images, torch.tensor([3, 0, 8, 3]), indices)
    for row, number in enumerate((3, 0, 8, 3)):
        assert torch.equal(seen[row], single_view(number, indices)(images)[row])
    assert view_indices("none", 8, 8) is None


@pytest.mark.parametrize("dataset", ["mnist", "mnist5k", "organamnist", "organsmnist_64"])
def test_what_means_something_else_when_mirrored_is_not_mirrored(dataset: str):
    with pytest.raises(UserError, match=f"{dataset} mean something else when mirrored: take shifts"):
        check_augmentation("flips_and_shifts", dataset)
    check_augmentation("shifts", dataset)
    for allowed in ("pathmnist", "pathmnist_64", "retinamnist", "mine.npz"):
        check_augmentation("flips_and_shifts", allowed)
