from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.images import fit_image, open_image

WIDE = np.array([[0, 0, 100, 100, 200, 200, 40, 40]] * 4, np.uint8)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("pad", [[0, 0, 0, 0], [0, 100, 200, 40], [0, 100, 200, 40], [0, 0, 0, 0]]),
        ("crop", [[100, 100, 200, 200]] * 4),
        ("stretch", [[0, 100, 200, 40]] * 4),
    ],
)
def test_the_rules(rule: str, expected: list):
    fitted = fit_image(Image.fromarray(WIDE), (4, 4), rule, 1)
    assert (fitted.shape, fitted.dtype) == ((4, 4, 1), np.uint8)
    assert np.abs(fitted[..., 0].astype(int) - expected).max() <= 35, "the filter reaches into the neighbours"


@pytest.mark.parametrize("rule", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(4, 8), (6, 5), (40, 40)])
def test_every_rule_gives_the_size_and_leaves_what_has_it(rule: str, size: tuple[int, int]):
    fitted = fit_image(Image.fromarray(WIDE), size, rule, 3)
    assert fitted.shape == (*size, 3)
    if size == WIDE.shape:
        assert np.array_equal(fitted, np.dstack([WIDE] * 3))


def test_shrinking_averages():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    assert np.abs(fit_image(Image.fromarray(board.astype(np.uint8)), (8, 8), "pad", 1).astype(int) - 127).max() < 3


def test_a_cameras_orientation_and_the_luma_of_colours():
    turned = Image.fromarray(np.dstack([WIDE, WIDE // 2, 255 - WIDE]))
    turned.getexif()[0x112] = 6
    expected = np.rot90(np.asarray(Image.fromarray(np.dstack([WIDE, WIDE // 2, 255 - WIDE])).convert("L")), -1)
    assert np.array_equal(fit_image(turned, (8, 4), "pad", 1)[..., 0], expected)


@pytest.mark.parametrize(("mode", "options", "named"), [("P", {"transparency": 0}, "P with transparency"), ("LA", {}, "LA")])
def test_transparent_pixels_are_refused(tmp_path: Path, mode: str, options: dict, named: str):
    Image.fromarray(WIDE).convert(mode).save(tmp_path / "x.png", **options)
    with pytest.raises(UserError, match=f"its pixels are {named}"), open_image(tmp_path / "x.png"):
        pass
