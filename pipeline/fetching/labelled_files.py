"""Which image files a folder holds: their class and, where it is said, their split and patient, from folders or a table."""

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipeline.core.errors import UserError, user_error
from pipeline.data.dataset import SPLITS

UNLABELLED = "unlabelled"  # the folder
LIKE_SPLITS = {*SPLITS, "training", "valid", "validation", "testing"}  # in lower case
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")


class ImageFile(NamedTuple):
    """A file, and what is said of it; "" is what is not."""

    path: Path
    name: str  # below the folder
    label: str  # "": unlabelled
    split: str = ""
    patient: str = ""


class LeftOut(NamedTuple):
    """A file that is not taken."""

    reason: str
    name: str  # and, of a broken one, what is wrong with it


def list_folders(source: Path) -> tuple[list[ImageFile], list[LeftOut]]:
    """The files in `source`/<class>/ or `source`/<split>/<class>/, at any depth below, and in `source`/unlabelled/.

    Raises UserError for a folder beside train/, val/ and test/, and OSError.
    """
    folders = {path.name for path in source.iterdir() if path.is_dir() and not _hidden(path.name)} - {UNLABELLED}
    split_first = bool(folders & {*SPLITS})
    if alike := [name for name in folders - {*SPLITS} if name.lower() in LIKE_SPLITS]:
        raise UserError(f"{source}: {min(alike)}/ looks like a split: call the folders {', '.join(SPLITS)}, or use --table")
    if others := folders - {*SPLITS} if split_first else None:
        raise UserError(f"{source}: {min(others)}/ stands beside {min(folders & {*SPLITS})}/: {', '.join(SPLITS)} are splits")
    files, left_out = [], []
    for path, *parts in _walk(source):
        name, depth = "/".join(parts), len(parts) - 1 - split_first
        if any(map(_hidden, parts)):
            left_out.append(LeftOut("hidden", name))
        elif parts[0] == UNLABELLED and len(parts) > 1:
            files.append(ImageFile(path, name, ""))
        elif split_first and len(parts) > 2 and parts[1] == UNLABELLED:
            raise UserError(
                f"{source}: {parts[0]}/{UNLABELLED}/ is in a split: unlabelled images belong into {source}/{UNLABELLED}/"
            )
        elif depth < 1:
            left_out.append(LeftOut("in no folder of a class", name))
        else:
            files.append(ImageFile(path, name, parts[split_first], parts[0] if split_first else ""))
    if not split_first:
        empty = folders - {file.label for file in files}
        left_out += [LeftOut("a class without images", f"{name}/") for name in sorted(empty)]
    return files, left_out


def list_table(source: Path, table: Path) -> tuple[list[ImageFile], list[LeftOut]]:
    """The files that a CSV table names in its column `path`, relative to `source`, and those in `source`/unlabelled/.

    The column `label` is wanted, `split` and `patient` are read if they are there; others are not. Raises UserError for a table
    without these columns, with an empty cell in them, another split than train, val and test, or a file that stands twice.
    """
    strict = warnings.catch_warnings(action="error", category=pd.errors.ParserWarning)  # of rows with more cells than columns
    with strict, user_error(f"{table}: cannot be read as a table", Exception):  # pandas raises a dozen types on malformed bytes
        frame = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    frame.columns = [column.strip() for column in frame.columns]
    if missing := {"path", "label"} - {*frame.columns}:
        columns = ", ".join(map(repr, frame.columns))
        raise UserError(f"{table}: no column {min(missing)!r}; its columns, parted by commas, are {columns}")
    columns = [column for column in ("path", "label", "split", "patient") if column in frame]
    if twice := [column for column in columns if [*frame.columns].count(column) > 1]:
        raise UserError(f"{table}: column {twice[0]!r} stands twice")
    files = {}
    for line, row in enumerate(frame[columns].to_dict("records"), 2):
        row = {column: value.strip() for column, value in row.items()}
        if empty := [column for column, value in row.items() if not value]:
            raise UserError(f"{table}: {empty[0]} is empty in row {line}")
        if row.get("split", "test") not in SPLITS:
            raise UserError(f"{table}: split {row['split']!r} in row {line}: {', '.join(SPLITS)} are wanted")
        name = os.path.relpath(source / row["path"], source)  # of an absolute path, too
        if name in files:
            raise UserError(f"{table}: {name} stands twice, the second time in row {line}")
        files[name] = ImageFile(source / name, name, row["label"], row.get("split", ""), row.get("patient", ""))
    left_out = []
    for path, *parts in _walk(source):
        name = "/".join(parts)
        if name in files or path.resolve() == table.resolve():
            continue
        if any(map(_hidden, parts)):
            left_out.append(LeftOut("hidden", name))
        elif parts[0] == UNLABELLED and len(parts) > 1:
            files[name] = ImageFile(path, name, "")
        else:
            left_out.append(LeftOut("not in the table", name))
    return list(files.values()), left_out


def patients_by_pattern(files: list[ImageFile], pattern: str) -> list[ImageFile]:
    """`files` with the patient that the regular expression finds in the file's name: its first group, or all that it matches.

    A pattern with a slash in it is searched in the path below the folder. Raises UserError where it finds nothing.
    """
    with user_error(f"--group {pattern!r}: no regular expression", re.error):
        compiled = re.compile(pattern)
    patients = []
    for file in files:
        match = compiled.search(file.name if "/" in pattern else file.path.name)
        patients.append((match[compiled.groups and 1] or "") if match else "")
        if not patients[-1]:
            raise UserError(f"--group {pattern!r} finds no patient in {file.name}")
    return [file._replace(patient=patient) for file, patient in zip(files, patients, strict=True)]


def _walk(source: Path) -> Iterator[tuple[Path, ...]]:
    """Every file below `source`: its path, and its parts from there. Of a folder that links lead to again, nothing."""
    seen = {os.path.realpath(source)}
    for folder, folders, names in os.walk(source, followlinks=True):
        places = {name: os.path.realpath(Path(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name, place in places.items() if place not in seen]
        seen |= {*places.values()}
        for name in sorted(names):
            path = Path(folder, name)
            yield path, *path.relative_to(source).parts


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES
