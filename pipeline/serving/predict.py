"""Classify a folder of images with the exported student: `python -m pipeline.serving.predict FOLDER > scores.csv`.

Every PNG in the folder becomes a row: file, class, and the probability of each class. Images must have the size that the
student was trained on: others are refused, since how to scale them is not the student's to decide.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.core.cli import run
from pipeline.core.errors import UserError, user_error
from pipeline.export.onnx_model import Student


def main(folder: str) -> None:
    """Print the table for the images in `folder`."""
    student = Student(Path("models/student/student.onnx"))
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise UserError(f"{folder}: no PNG files there")
    rows = student.probabilities(np.stack([read_image(path, student.shape) for path in paths]))
    table = pd.DataFrame(rows, columns=student.classes, index=pd.Index([path.name for path in paths], name="file"))
    table.insert(0, "class", [student.classes[number] for number in rows.argmax(axis=1)])
    table.to_csv(sys.stdout, float_format="%.6f")


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, uint8 of `shape` (H, W, C). Raises UserError for a file that is no image or has another size."""
    height, width, channels = shape
    with user_error(f"{path}: cannot be read as an image", Exception):  # Pillow raises a dozen types on malformed bytes
        if not path.is_file():  # a folder, or a pipe that nothing comes out of
            raise ValueError("not a file")
        # Pillow refuses images of over 179 million pixels by itself, and warns of half as many.
        refused = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with refused, Image.open(path, formats=["PNG"]) as image:
            if image.size != (width, height):  # known before the pixels are unpacked
                raise ValueError(f"{image.size[0]}x{image.size[1]} pixels; the student takes {width}x{height}")
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(shape)


if __name__ == "__main__":
    run(main, folder=None)
