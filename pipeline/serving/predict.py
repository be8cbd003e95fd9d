"""Classify images with an exported student: `python -m pipeline.serving.predict image.png`.

Needs onnxruntime, numpy and pillow alone for the models in models/student/. Prints a table (CSV): each image, its class, and the
probability of every class. Of a folder, every PNG, JPEG, TIFF and DICOM file in it is an image; other files are named and left
out. Images are read as those of a data set (pipeline/fetching/image_files.py): 8-bit grey, RGB or palette without transparency,
deeper grey by --window, DICOM by its own window where pydicom is installed. Those of another size than the model's are resized as
its training images were, by the rule in its file; where it has none, by --resize or not at all. A camera's orientation (EXIF) is
followed; colours become grey by ITU-R 601's luma for a model of grey images, and grey is repeated in each channel for one of
colours.
"""

import csv
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line, user_error
from pipeline.core.images import FORMATS, RULES, fit_image
from pipeline.export.onnx_model import Student, open_foreign
from pipeline.fetching.image_files import Window, check_window, is_dicom, read_header, read_image_file

PUBLISHED = Path(__file__).resolve().parents[2] / "models/student"  # of this repository: as trustworthy as its code
DEFAULT = "models/student/baselines.onnx"
NAMED = 5  # broken images that an error names
FORMULA = tuple("=+-@\t\r")  # what a spreadsheet takes for the beginning of a formula


def main(
    images: list[Path],
    model: Path | None = None,
    resize: str | None = None,
    window: Window | None = None,
    leave_out_broken: bool = False,
) -> None:
    """Print the table for `images`, files and folders, by the model in the file `model`; `resize`, `window`: see `read_image`.

    Raises UserError if an image cannot be read, and nothing is printed; with `leave_out_broken`, it is named on stderr.
    """
    check_window(window)
    student = open_model(model or Path(DEFAULT))
    if not model:
        print(f"model: {DEFAULT}, classes {', '.join(student.classes)}; others: --model", file=sys.stderr)
    paths = [path for given in images for path in (images_in(given) if given.is_dir() else [given])]
    read, broken = [], []
    for path in paths:
        try:
            read.append((path, read_image(path, student.shape, student.resize or resize, window)))
        except UserError as error:
            broken.append(one_line(error))
    if broken and not (leave_out_broken and read):
        advice = ": --leave-out-broken predicts the others" if read else ""
        raise UserError("; ".join(broken[:NAMED]) + ("; ..." if len(broken) > NAMED else "") + advice)
    for message in broken:
        print(f"left out: {message}", file=sys.stderr)
    rows = student.probabilities(np.stack([pixels for _, pixels in read]))
    if not np.isfinite(rows).all():
        raise UserError(f"{student.path}: its probabilities are no numbers: dvc repro export_student")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", "class", *map(as_text, student.classes)])
    for (path, _), row in zip(read, rows, strict=True):
        table.writerow([as_text(str(path)), as_text(student.classes[row.argmax()]), *(f"{share:.6f}" for share in row)])


def open_model(path: Path) -> Student:
    """A published model as it is; any other file after a trial, and only where the package `onnx` is installed."""
    if not path.is_file():
        models = ", ".join(sorted(file.name for file in path.parent.glob("*.onnx")))
        advice = "dvc repro export_student or, of an experiment, dvc get . models/exported/TRACK/student.onnx --rev NAME -o FILE"
        raise UserError(f"{path}: no such file: {f'there are {models}' if models else advice}")
    if path.resolve().parent == PUBLISHED:
        return Student(path)
    with user_error(f"{path}: to try a file that is not in models/student", ImportError, then="pip install onnx"):
        return open_foreign(path)


def images_in(folder: Path) -> list[Path]:
    """The PNG, JPEG, TIFF and DICOM files of a folder; others are named on stderr. Raises UserError if there are none."""
    with user_error(f"{folder}: cannot be listed", OSError):
        files = sorted(folder.iterdir())
    paths = [path for path in files if _is_image(path)]
    for path in files:
        if path not in paths:
            kind = "a folder: name it beside this one" if path.is_dir() else "no PNG, JPEG, TIFF or DICOM"
            print(f"left out: {one_line(path)}: {kind}", file=sys.stderr)
    if not paths:
        raise UserError(f"{folder}: no PNG, JPEG, TIFF or DICOM files there")
    return paths


def _is_image(path: Path) -> bool:
    try:
        return path.suffix.lower() in FORMATS or is_dicom(path)
    except OSError:  # not for us to read
        return False


def as_text(name: str) -> str:
    """A name for a cell: what is no Unicode in it is escaped, and a spreadsheet sees text where it would see a formula."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name)
    return f"'{text}" if name.startswith(FORMULA) else text


def read_image(path: Path, shape: tuple[int, int, int], resize: str | None = None, window: Window | None = None) -> np.ndarray:
    """One image, uint8 of `shape` (H, W, C), resized by the rule `resize`; `window` as in `read_image_file`.

    Raises UserError as `read_image_file` and, without a rule, for an image of another size.
    """
    height, width, channels = shape
    with user_error(f"{path}: DICOM files need pydicom", ImportError, then="pip install -r requirements-dicom.lock"):
        size = read_header(path, window).size
        fits = resize or sorted(size) == sorted((width, height))  # known before the pixels are unpacked; it may lie on its side
        image = read_image_file(path, window) if fits else None
    if image is None or not (resize or image.size == (width, height)):
        sizes = f"{size[0]}x{size[1]} pixels; the student takes {width}x{height}"
        raise UserError(f"{path}: {sizes} and knows no rule to resize by: --resize {', '.join(RULES)}")
    return fit_image(image, (height, width), resize or "stretch", channels)


if __name__ == "__main__":
    options = ArgumentParser(add_help=False)
    options.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a file, or a folder of files")
    options.add_argument("--model", type=Path, help=f"an exported student (default: {DEFAULT})")
    options.add_argument("--resize", choices=RULES, help="how to resize images of another size if the model's file does not say")
    options.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="what becomes 0 and 255, beyond 8 bits")
    options.add_argument("--leave-out-broken", action="store_true", help="predict the others where an image cannot be read")
    run(main, options)
