"""Image files as pixels: which are read, and how they are resized: the same when a set is made and when a student predicts.

Needs NumPy and Pillow alone.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.core.errors import user_error

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF"}  # Pillow's names, by suffix
MODES = ("L", "RGB", "P")  # Pillow's names of 8-bit grey, RGB and palette images
DEEP = ("I;16", "I;16B", "I;16L", "I", "F")  # of grey with more than 8 bits
RULES = {"pad": ImageOps.pad, "crop": ImageOps.fit, "stretch": Image.Image.resize}  # of Dataset.resize


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Yield the image in a PNG, JPEG or TIFF file, its pixels not yet unpacked.

    Raises UserError, for what fails in the block too: for a file that is damaged, none of these formats, or implausibly large,
    for pixels that are transparent or of another mode than MODES and DEEP, and for a TIFF of several pages or an animated PNG.
    """
    with user_error(f"{path}: cannot be read as an image", Exception):  # Pillow raises a dozen types on malformed bytes
        if not path.is_file():  # a folder, or a pipe that nothing comes out of
            raise ValueError("not a file" if path.exists() else "no such file")
        # Pillow refuses images of over 179 million pixels by itself, and warns of half as many.
        refused = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with refused, Image.open(path, formats=sorted({*FORMATS.values()})) as image:
            of_16_bits = image.mode == "RGB" and any(";16" in str(tile) for tile in image.tile)  # Pillow keeps 8 of them
            if image.mode not in (*MODES, *DEEP) or "transparency" in image.info or of_16_bits:
                kind = f"{image.mode}{' of 16 bits' if of_16_bits else ''}"
                kind += " with transparency" if "transparency" in image.info else ""
                raise ValueError(f"its pixels are {kind}; 8-bit grey, RGB or palette ones without transparency are wanted")
            if image.format in ("TIFF", "PNG") and image.n_frames > 1:
                raise ValueError(f"{image.n_frames} pages or frames; one is wanted")
            yield image


def fit_image(image: Image.Image, size: tuple[int, int], rule: str, channels: int) -> np.ndarray:
    """The image's pixels, uint8 of shape (*size, channels), with `size` (height, width) and 1 or 3 `channels`.

    A camera's orientation (EXIF) is followed. Colours become grey by ITU-R 601's luma; grey is repeated in each channel. Then the
    image is scaled by Pillow's bilinear filter, which averages where it shrinks: by `pad` as a whole, centred on black; by
    `crop` so that it covers everything, cut alike on both sides; by `stretch` to the size, whatever that does to proportions. An
    image that has the size already stays as it is.
    """
    image, target = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"), (size[1], size[0])
    resized = RULES[rule](image, target, Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(*size, channels)
