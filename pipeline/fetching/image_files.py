"""One image file, read for a data set or to be predicted: PNG, JPEG, TIFF or, where pydicom is installed, DICOM.

Pixels of more than 8 bits need a window: what is at its lower end or below becomes 0, at its upper end or above 255, and what is
between them grows evenly. A DICOM file brings its own (its first WindowCenter and WindowWidth, after the rescale); without
one, the window is everything that the file's BitsStored can hold. MONOCHROME1 is inverted: bright stays bright.
"""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pipeline.core.errors import UserError, user_error
from pipeline.core.images import DEEP, FORMATS, open_image

if TYPE_CHECKING:
    from pydicom import Dataset

WHITE_IS_ZERO = (262, 0)  # a TIFF tag and its value
DICM = b"DICM"  # after 128 bytes: files without a suffix are common
ENDS = np.array([-(2.0**40), 2.0**40])  # beyond every pixel

Window = tuple[float, float]


class Header(NamedTuple):
    """What a file says before its pixels are unpacked."""

    colour: bool
    patient: str  # PatientID; "" where there is none
    size: tuple[int, int]  # width and height in pixels, before a camera's orientation is followed


def check_window(window: Window | None) -> None:
    """Raises UserError for a window whose ends are no numbers, the same or exchanged."""
    if window is None:
        return
    width = window[1] - window[0]
    if not (width > 0 and math.isfinite(width) and math.isfinite(1 / width)):
        raise UserError(f"--window {window[0]:g} {window[1]:g}: two numbers are wanted, the lower first")


def is_dicom(path: Path) -> bool:
    """Whether the file is a DICOM image, by its content or its suffix. Raises OSError."""
    if path.suffix.lower() in FORMATS or path.name == "DICOMDIR" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == DICM or path.suffix.lower() == ".dcm"


def read_header(path: Path, window: Window | None) -> Header:
    """What the file says of itself. Raises as `read_image_file`, for all that shows without the pixels."""
    if is_dicom(path):
        dataset = _dicom(path, pixels=False)
        patient = str(dataset.get("PatientID") or "").strip()
        return Header(dataset.SamplesPerPixel == 3, patient, (dataset.Columns, dataset.Rows))
    with open_image(path) as image:
        if image.mode in DEEP and window is None:
            raise _no_window(image)
        return Header(image.mode not in ("L", *DEEP), "", image.size)


def read_image_file(path: Path, window: Window | None) -> Image.Image:
    """The image in the file, 8-bit grey, RGB or palette. `window` holds for grey of more than 8 bits, and for DICOM's.

    Raises UserError as `open_image`; for a DICOM file of several frames, or with pixels that are neither grey nor 8-bit RGB; for
    pixels of more than 8 bits without a window, or that are no numbers. Raises ImportError for DICOM without pydicom.
    """
    if is_dicom(path):
        dataset = _dicom(path, pixels=True)
        with user_error(f"{path}: cannot be read as DICOM", Exception):
            return _dicom_image(dataset, window)
    with open_image(path) as image:
        if image.mode not in DEEP:
            return ImageOps.exif_transpose(image)
        if window is None:
            raise _no_window(image)
        grey = _windowed(np.asarray(ImageOps.exif_transpose(image)), *window)
        tag, value = WHITE_IS_ZERO
        inverted = image.format == "TIFF" and image.tag_v2.get(tag) == value  # Pillow does this for 8 bits alone
        return Image.fromarray(255 - grey if inverted else grey)


def _no_window(image: Image.Image) -> ValueError:
    low, high = image.getextrema()
    return ValueError(
        f"its pixels have more than 8 bits, values {low:g} to {high:g}: --window LOW HIGH says which of them become 0 and 255"
    )


def _windowed(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """`pixels` as uint8: `low` becomes 0, `high` 255."""
    if not np.isfinite(pixels).all() or not low < high:
        raise ValueError(f"pixels that are no numbers, or an empty window: {low:g} to {high:g}")
    return np.rint(np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _dicom(path: Path, pixels: bool) -> "Dataset":
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with user_error(f"{path}: cannot be read as DICOM", Exception):  # pydicom raises a dozen types on malformed bytes
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise ValueError("it is deflated as a whole, to an unknown size")
        dataset = dcmread(path, stop_before_pixels=not pixels)
        kind, frames = dataset.PhotometricInterpretation, int(dataset.get("NumberOfFrames") or 1)
        grey = kind in ("MONOCHROME1", "MONOCHROME2") and dataset.SamplesPerPixel == 1
        colour = kind.startswith(("RGB", "YBR")) and dataset.SamplesPerPixel == 3 and dataset.BitsAllocated == 8
        if not (grey or colour):
            raise ValueError(f"its pixels are {kind} of {dataset.BitsAllocated} bits; grey or 8-bit RGB ones are wanted")
        if frames > 1 or dataset.Rows * dataset.Columns > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{frames} frames of {dataset.Columns}x{dataset.Rows} pixels; one is wanted, not over 89 million")
        return dataset


def _dicom_image(dataset: "Dataset", window: Window | None) -> Image.Image:
    from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array

    with warnings.catch_warnings(action="ignore"):  # of a byte too many or too few at the end
        stored = pixel_array(dataset)  # colours as RGB
    if stored.shape[:2] != (dataset.Rows, dataset.Columns):
        raise ValueError("it has more pixels than one frame")
    if dataset.SamplesPerPixel == 3:
        return Image.fromarray(stored)
    pixels = apply_modality_lut(stored, dataset)
    if window is None and None not in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        with np.errstate(over="ignore"):  # in a sigmoid, at the ends
            window = tuple(apply_windowing(ENDS, dataset))  # pydicom's range of results
        pixels = apply_windowing(pixels, dataset)
    elif window is None:
        lowest = -(2 ** (dataset.BitsStored - 1)) if dataset.PixelRepresentation else 0
        ends = np.array([lowest, lowest + 2**dataset.BitsStored - 1])
        window = tuple(sorted(apply_modality_lut(ends, dataset)))
    grey = _windowed(pixels, *window)
    return Image.fromarray(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)
