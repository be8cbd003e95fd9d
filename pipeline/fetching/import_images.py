"""Make a data set, one .npz file, of image files.

    python -m pipeline.fetching.import_images SOURCE out.npz                      of SOURCE/<class>/
    python -m pipeline.fetching.import_images SOURCE out.npz                      of SOURCE/{train,val,test}/<class>/
    python -m pipeline.fetching.import_images SOURCE out.npz --table labels.csv   columns path, label; patient, split if known

A patient (the table's column, DICOM's PatientID, or --group) is in one split alone. Images in SOURCE/unlabelled/ get no label. A
summary is printed, and written beside out.npz. docs/data.md says how images are read, resized and split.
"""

import re
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
from tqdm import tqdm

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line, user_error
from pipeline.core.files import atomic_file, write_atomic
from pipeline.core.images import fit_image
from pipeline.data.dataset import SPLITS, Resize
from pipeline.fetching.duplicates import duplicates
from pipeline.fetching.image_files import Window, check_window, read_header, read_image_file
from pipeline.fetching.import_summary import summarise
from pipeline.fetching.labelled_files import UNLABELLED, ImageFile, LeftOut, list_folders, list_table, patients_by_pattern
from pipeline.fetching.sources import as_source
from pipeline.fetching.splitting import split_files

PARTS = (*SPLITS, UNLABELLED)
SIZES = range(8, 4097)
FEW = 1000  # images, of which one test split settles nothing
NAMED = 5  # files that an error names
FEW_LEVELS = 64  # of 256, below which a window is doubtful
T = TypeVar("T")


def main(
    source: Path,
    out: Path,
    size: int = 28,
    table: Path | None = None,
    group: str | None = None,
    resize: Resize = "pad",
    channels: int | None = None,
    window: Window | None = None,
    leave_out_broken: bool = False,
    allow_duplicates: bool = False,
    force: bool = False,
) -> None:
    """Write `out` and the summary beside it; nothing if anything fails. Raises UserError, before pixels are read where it can."""
    _check_arguments(source, out, size, window, force)
    files, left_out = list_table(source, table) if table else list_folders(source)
    if group and any(file.patient for file in files):
        raise UserError(f"{table} has a column 'patient', and --group is given: one of them is wanted")
    with user_error("DICOM files need pydicom", ImportError, then="pip install -r requirements-dicom.lock"):
        files, headers, broken = _each(files, lambda file: read_header(file.path, window), "headers", leave_out_broken)
    left_out += broken
    files = [file._replace(patient=file.patient or header.patient) for file, header in zip(files, headers, strict=True)]
    files, apart = split_files(patients_by_pattern(files, group) if group else files)
    left_out += apart
    shape = size, size, channels or (3 if any(header.colour for header in headers) else 1)
    _arrays(source, files, np.broadcast_to(np.uint8(0), (len(files), *shape)), resize)  # whether they can be a set at all
    with tempfile.TemporaryFile(dir=out.parent) as pixels:

        def write(file: ImageFile) -> None:
            with user_error(f"{file.path}: cannot be resized", ValueError):  # a thin line, of which nothing would be left
                pixels.write(fit_image(read_image_file(file.path, window), shape[:2], resize, shape[2]))

        files, _, broken = _each(files, write, "images", leave_out_broken)
        left_out += broken
        pixels.flush()
        images = np.memmap(pixels, np.uint8, "r", shape=(len(files), *shape)) if files else np.empty((0, *shape), np.uint8)
        arrays = _arrays(source, files, images, resize)
        if window and (levels := len(np.unique(images))) < FEW_LEVELS:
            values = f"--window {window[0]:g} {window[1]:g} makes {levels} of 256 grey levels of these images"
            print(f"warning: {values}: does it hold their values?", file=sys.stderr)
        pairs = _equal_images(files, arrays)
        if pairs and not allow_duplicates:
            raise UserError(f"{source}: {_several(pairs, 'images')} in two splits: remove one of each, or --allow-duplicates")
        with atomic_file(out) as file:
            np.savez(file, **arrays)
    kind = f"{'grey' if shape[2] == 1 else 'colour'} images of {size}x{size} pixels, resized by `{resize}`"
    title = f"{out.name}: {kind}{f', window {window[0]:g} to {window[1]:g}' if window else ''}"
    summary = summarise(title, files, arrays["class_names"].tolist(), left_out, pairs)
    write_atomic(out.with_suffix(".md"), summary)
    plain = re.fullmatch(r"[\w./-]+", path := str(out.resolve()), re.ASCII)
    following = f"dvc exp run --temp -S distillation.dataset={path} report@distillation"
    print(f"{summary}\nNext: {following if plain else 'put its path into params.yaml, as a dataset'}")
    if len(files) < FEW:
        print('Of so few images: docs/data.md, "Few images: folds", has a recipe for them')


def _check_arguments(source: Path, out: Path, size: int, window: Window | None, force: bool) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: there is no such folder")
    with user_error(f"{one_line(out)}: a name that is no Unicode", UnicodeEncodeError):
        str(out).encode()
    if out.suffix != ".npz":
        raise UserError(f"{out}: a file name that ends in .npz is wanted")
    if size not in SIZES:
        raise UserError(f"--size {size}: {SIZES[0]} to {SIZES[-1]} pixels are wanted")
    check_window(window)
    for path in (out, out.with_suffix(".md")):
        if path.exists() and not force:
            raise UserError(f"{path} is there already: --force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _each(
    files: list[ImageFile], read: Callable[[ImageFile], T], name: str, leave_out: bool
) -> tuple[list[ImageFile], list[T], list[LeftOut]]:
    """The files that can be read, what `read` returned for each, and the others. Raises UserError unless they may be left out."""
    taken, results, broken = [], [], []
    for file in tqdm(files, name, disable=None):
        try:
            results.append(read(file))
        except UserError as error:
            broken.append(str(error))
        else:
            taken.append(file)
    if broken and not leave_out:
        raise UserError(f"{_several(broken, 'files')} cannot be taken: repair or remove them, or --leave-out-broken")
    return taken, results, [LeftOut("cannot be taken", problem) for problem in broken]


def _several(names: Sequence[str], kind: str) -> str:
    return f"{len(names):,} {kind} ({'; '.join(names[:NAMED])}{'; ...' if len(names) > NAMED else ''})"


def _arrays(source: Path, files: list[ImageFile], images: np.ndarray, resize: Resize) -> dict[str, np.ndarray]:
    """The file's arrays. `images`, uint8 (N, H, W, C), and `files` lie in order of PARTS. Raises UserError as `as_source`."""
    classes = sorted({file.label for file in files if file.label}, key=_number_first)
    numbers = {label: number for number, label in enumerate(classes)}
    arrays = {"class_names": np.array(classes, np.str_), "resize": np.array(resize)}
    splits, start = [file.split for file in files], 0
    for part in PARTS:
        members = files[start : start + splits.count(part)]
        if members:
            arrays[f"{part}_images"] = images[start : start + len(members)]
        if members and part in SPLITS:
            arrays[f"{part}_labels"] = np.array([numbers[file.label] for file in members])
        if any(file.patient for file in members):
            arrays[f"{part}_groups"] = np.array([file.patient for file in members], np.str_)
        start += len(members)
    as_source(source, source.name, arrays)
    return arrays


def _number_first(name: str) -> tuple[bool, int, str]:
    """A key that orders numbers by value, and other names after them."""
    number = name.isdecimal() and len(name) < 20
    return not number, int(name) if number else 0, name


def _equal_images(files: list[ImageFile], arrays: dict[str, np.ndarray]) -> list[str]:
    """Pairs of images in two splits that are equal once resized: so is what was equal byte for byte, or pixel for pixel, before.

    Copies of another size or format are found too. An unlabelled copy of a training image does no harm.
    """
    names = {part: [file.name for file in files if file.split == part] for part in PARTS}
    pairs = duplicates({part: arrays[f"{part}_images"] for part in PARTS if names[part]})
    return [
        f"{part}: {names[part][row]} = {other}: {names[other][other_row]}"
        for (other, other_row), (part, row) in pairs
        if (other, part) != ("train", UNLABELLED)
    ]


def _options() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder of image files: PNG, JPEG, TIFF, DICOM")
    parser.add_argument("out", metavar="out.npz", type=Path, help="the file to write; the summary is out.md")
    parser.add_argument("--size", type=int, default=28, help="pixels a side (default 28)")
    parser.add_argument("--table", type=Path, help="a CSV file; its paths are relative to SOURCE")
    parser.add_argument("--group", help="a regular expression that finds the patient in a file's name")
    parser.add_argument("--resize", choices=get_args(Resize), default="pad", help="pad with black (default), crop, or stretch")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1: grey, 3: colour (default: 3 if any image has colours)")
    parser.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="what becomes 0 and 255, beyond 8 bits")
    parser.add_argument("--leave-out-broken", action="store_true", help="leave out, and list, files that cannot be read")
    parser.add_argument("--allow-duplicates", action="store_true", help="list equal images in two splits, and take them")
    parser.add_argument("--force", action="store_true", help="replace out.npz")
    return parser


if __name__ == "__main__":
    run(main, _options())
