"""Classify a folder of images with an exported student: `python -m pipeline.serving.predict FOLDER [TRACK] > scores.csv`.

Every PNG and JPEG in the folder becomes a row: file, class, and the probability of each class; other files are named and left
out. Images must have the size that the student was trained on: others are refused, since how to scale them is not the student's
to decide. They are 8-bit grey, RGB or palette images without transparency; a camera's orientation (EXIF) is followed, colours
become grey by ITU-R 601's luma for a student of grey images, and grey is repeated in each channel for one of colours.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line, user_error
from pipeline.export.onnx_model import open_foreign
from pipeline.params import TRACKS

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMULA = tuple("=+-@\t\r")  # what a spreadsheet takes for the beginning of a formula


def main(folder: str, track: str = "distillation") -> None:
    """Print the table for the images in `folder`, by a track's student."""
    student = open_foreign(Path("models/exported") / track / "student.onnx")
    with user_error(f"{folder}: cannot be listed", OSError):
        files = sorted(Path(folder).iterdir())
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    for path in files:
        if path not in paths:
            print(f"left out: {one_line(path)}: no PNG or JPEG", file=sys.stderr)
    if not paths:
        raise UserError(f"{folder}: no PNG or JPEG files there")
    rows = student.probabilities(np.stack([read_image(path, student.shape) for path in paths]))
    if not np.isfinite(rows).all():
        raise UserError(f"{student.path}: its probabilities are no numbers: dvc repro export_student")
    names = [as_text(path.name) for path in paths]
    table = pd.DataFrame(rows, columns=map(as_text, student.classes), index=pd.Index(names, name="file"))
    table.insert(0, "class", [as_text(student.classes[number]) for number in rows.argmax(axis=1)], allow_duplicates=True)
    table.to_csv(sys.stdout, float_format="%.6f")


def as_text(name: str) -> str:
    """A name for a cell: what is no Unicode in it is escaped, and a spreadsheet sees text where it would see a formula."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if text.startswith(FORMULA) else text


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, uint8 of `shape` (H, W, C). Raises UserError for a file that is no image of that size, or of another kind."""
    height, width, channels = shape
    with user_error(f"{path}: cannot be read as an image", Exception):  # Pillow raises a dozen types on malformed bytes
        if not path.is_file():  # a folder, or a pipe that nothing comes out of
            raise ValueError("not a file")
        # Pillow refuses images of over 179 million pixels by itself, and warns of half as many.
        refused = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with refused, Image.open(path, formats=["PNG", "JPEG"]) as image:
            if sorted(image.size) != sorted((width, height)):  # known before the pixels are unpacked
                raise ValueError(f"{image.size[0]}x{image.size[1]} pixels; the student takes {width}x{height}")
            if image.mode not in ("L", "RGB", "P") or "transparency" in image.info:
                kind = f"{image.mode}{' with transparency' if 'transparency' in image.info else ''}"
                raise ValueError(f"its pixels are {kind}; 8-bit grey, RGB or palette ones without transparency are wanted")
            image = ImageOps.exif_transpose(image)
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(shape)


if __name__ == "__main__":
    run(main, folder=None, track=tuple(TRACKS))
