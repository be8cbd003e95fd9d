"""Classify a folder of images with an exported student: `python -m pipeline.serving.predict FOLDER [TRACK] > scores.csv`.

Every PNG, JPEG and TIFF in the folder becomes a row: file, class, and the probability of each class; other files are named and
left out. Images of another size than the student's are resized as its training images were, by the rule in its file; where it has
none, they are refused. They are 8-bit grey, RGB or palette images without transparency; a camera's orientation (EXIF) is
followed, colours become grey by ITU-R 601's luma for a student of grey images, and grey is repeated in each channel for one of
colours.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ImageOps

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line, user_error
from pipeline.data.dataset import Resize
from pipeline.data.images import FORMATS, fit_image, open_image
from pipeline.export.onnx_model import open_foreign
from pipeline.params import TRACKS

FORMULA = tuple("=+-@\t\r")  # what a spreadsheet takes for the beginning of a formula


def main(folder: str, track: str = "distillation") -> None:
    """Print the table for the images in `folder`, by a track's student."""
    student = open_foreign(Path("models/exported") / track / "student.onnx")
    with user_error(f"{folder}: cannot be listed", OSError):
        files = sorted(Path(folder).iterdir())
    paths = [path for path in files if path.suffix.lower() in FORMATS]
    for path in files:
        if path not in paths:
            print(f"left out: {one_line(path)}: no PNG, JPEG or TIFF", file=sys.stderr)
    if not paths:
        raise UserError(f"{folder}: no PNG, JPEG or TIFF files there")
    rows = student.probabilities(np.stack([read_image(path, student.shape, student.resize) for path in paths]))
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


def read_image(path: Path, shape: tuple[int, int, int], resize: Resize | None = None) -> np.ndarray:
    """One image, uint8 of `shape` (H, W, C), resized by the rule `resize`.

    Raises UserError as `open_image` and, without a rule, for an image of another size.
    """
    height, width, channels = shape
    with open_image(path) as image:
        wrong_size = ValueError(f"{image.size[0]}x{image.size[1]} pixels; the student takes {width}x{height}")
        if not resize and sorted(image.size) != sorted((width, height)):  # known before the pixels are unpacked
            raise wrong_size
        image = ImageOps.exif_transpose(image)
        if not resize and image.size != (width, height):  # lies on its side
            raise wrong_size
        return fit_image(image, (height, width), resize or "stretch", channels)


if __name__ == "__main__":
    run(main, folder=None, track=tuple(TRACKS))
