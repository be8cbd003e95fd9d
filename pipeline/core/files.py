"""Where files are, and how they are read and written: atomically."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import psutil
import yaml

from pipeline.core.errors import UserError, user_error

LARGEST_YAML = 100_000  # bytes


def main_checkout() -> Path:
    """The checkout that the user stands in: for DVC's temporary copies, which do not last, the one they were made from."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).parents[2]).resolve()


def from_main_checkout(path: str | Path) -> Path:
    """`path` as an absolute path; a relative one counts from the main checkout, `~` is the home folder."""
    with user_error(str(path), RuntimeError):  # `~nobody`
        return Path(os.path.normpath(main_checkout() / Path(path).expanduser()))


@contextlib.contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """Yield a free path; what the block puts there replaces `path` when it ends well and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.suffixes[-2].removeprefix(".")
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):  # a killed process left it
            shutil.rmtree(left, ignore_errors=True)
    try:
        with TemporaryDirectory(f".{os.getpid()}.partial", f".{path.name}.", path.parent) as folder:
            yield Path(folder, path.name)
            os.replace(Path(folder, path.name), path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it takes the place of `path` when the block ends well and vanishes otherwise. Raises OSError."""
    with _replacement(path) as partial, partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `path` when the block ends well and vanishes otherwise."""
    with _replacement(path) as partial:
        partial.mkdir()
        yield partial
        shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, *parts: bytes | str) -> None:
    """Write `path` so that it appears complete or, when anything fails, stays as it was. Raises OSError."""
    with atomic_file(path) as file:
        file.writelines(part.encode() if isinstance(part, str) else part for part in parts)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that a stage wrote. Raises UserError if it is missing or damaged."""
    with user_error(f"{path}: cannot be read", OSError, ValueError, RecursionError, then="run dvc repro"):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of named values")
        return content


def md5(path: Path) -> str:
    """The file's MD5 in hex: the checksum that DVC, medmnist and torchvision publish and compare."""
    return digest(path, "md5")


def digest(path: Path, algorithm: str) -> str:
    """The file's digest in hex, by hashlib's name of the algorithm."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 has it and DVC writes it. No aliases: with them a few lines can stand for gigabytes."""

    def fetch_alias(self) -> None:
        raise yaml.YAMLError(f"aliases are not read: {self.get_mark()}")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Of a key that stands twice, YAML would silently take the last."""
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1][:1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Of 010 and 1:30, PyYAML would make 8 and 90, and DVC, which reads YAML 1.2 and keeps the record, 10 and a string."""
        value, integer = node.value, node.tag == "tag:yaml.org,2002:int"
        if ":" in value or (integer and re.match("[-+]?0[0-9_]", value)):
            raise yaml.YAMLError(f"{value} is one number by YAML 1.1, another or none by 1.2: no leading 0, no colon, please")
        return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)


_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def read_yaml(path: Path) -> Any:
    """The content of a small YAML file. Raises UserError, in one line, for a file that is missing, no YAML, or malformed."""
    with user_error(f"cannot read {path}", OSError, UserError), path.open("rb") as file:
        return parse_yaml(file.read(LARGEST_YAML + 1))


def parse_yaml(content: bytes) -> Any:
    """The content of a small YAML document. Raises UserError for one that is no YAML, or malformed."""
    if len(content) > LARGEST_YAML:
        raise UserError(f"over {LARGEST_YAML:,} bytes")
    with user_error("no YAML", Exception):  # PyYAML's constructors raise a dozen types on values such as !!timestamp x
        return yaml.load(content.decode(), _Loader)  # noqa: S506 (a SafeLoader)
