"""Classify a folder of images with the exported student: `python -m pipeline.score_images FOLDER > scores.csv`.

Every PNG in the folder, of the size and the colours that the student was trained on, becomes a row: file, class, and the
probability of each class. Images of another size are refused, since how to scale them is not the student's to decide.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from pipeline.errors import UserError, run

MODEL = Path("models/student/student.onnx")


def main(folder: str) -> None:
    if not MODEL.is_file():
        raise UserError(f"{MODEL}: missing: dvc repro export_student, or dvc pull")
    from onnxruntime import InferenceSession

    session = InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    shape = tuple(session.get_inputs()[0].shape[1:])
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise UserError(f"{folder}: no PNG files there")
    images = np.stack([read_image(path, shape) for path in paths])
    rows = np.concatenate(
        [session.run(None, {"images": batch})[0] for batch in np.array_split(images, -(-len(images) // 250))]
    )
    table = pd.DataFrame(rows, columns=classes, index=pd.Index([path.name for path in paths], name="file"))
    table.insert(0, "class", [classes[number] for number in rows.argmax(axis=1)])
    table.to_csv(sys.stdout, float_format="%.6f")


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image, uint8 of `shape` (H, W, C). Raises UserError for a file that is no image or has another size."""
    height, width, channels = shape
    try:
        with Image.open(path) as image:
            if image.size != (width, height):  # known before the pixels are unpacked
                raise UserError(f"{path}: {image.size[0]}x{image.size[1]} pixels; the student takes {width}x{height}")
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(shape)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error


if __name__ == "__main__":
    run(main, folder=None)
