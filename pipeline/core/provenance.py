"""Which code on which machine: for tags and reports."""

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.files import parse_yaml

PIPELINE = Path(__file__).parents[1]
DECIDE_NOTHING = {"core", "tracking", "serving", "reporting", "params.py"}  # of a result's bytes
EXPERIMENT = re.compile(r"(\w+) refs/exps/(\w\w)/(\w{38})/(.+)")  # of DVC: revision; baseline, in two parts; name


def git(*arguments: str) -> str:
    """What git prints in the checkout that this code lies in; nothing if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=PIPELINE.parent, capture_output=True, check=False)  # noqa: S603, S607
        return done.stdout.decode(errors="replace")
    except OSError:
        return ""


def experiments(*options: str) -> list[tuple[str, str, str]]:
    """Every DVC experiment of the checkout: its revision, its baseline's, its name; `options` as for git for-each-ref."""
    references = git("for-each-ref", "--format=%(objectname) %(refname)", *options, "refs/exps")
    return [(revision, start + rest, name) for revision, start, rest, name in EXPERIMENT.findall(references)]


def commit() -> str:
    """The git commit that the code comes from; in an experiment's temporary copy, that of the user's checkout."""
    return os.environ.get("DVC_EXP_BASELINE_REV") or git("rev-parse", "HEAD").strip()


def code_is_committed() -> bool:
    """Whether pipeline/ and dvc.yaml are as in a commit; False where git does not say."""
    return bool(commit()) and not git("status", "--porcelain", "--", "pipeline", "dvc.yaml")


def committed_parameters(revision: str) -> dict[str, Any]:
    """params.yaml of a revision, its values by their dotted keys; nothing if git does not have it."""
    with contextlib.suppress(UserError, AttributeError):  # no mapping
        return dict(_leaves(parse_yaml(git("show", f"{revision}:./params.yaml").encode()))) if revision else {}
    return {}


def locked_parameters(revision: str) -> dict[str, Any]:
    """As `committed_parameters`, but those that dvc.lock says the revision's results were made with, where it has them."""
    parameters = committed_parameters(revision)
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # no such file, or another's
        stages = parse_yaml(git("show", f"{revision}:./dvc.lock").encode())["stages"].values()
        for stage in stages:
            parameters |= dict(_leaves(stage.get("params", {}).get("params.yaml", {})))
    return parameters


def _leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def code_digest(packages: Iterable[str] | None = None) -> str:
    """SHA-256 of the Python files of these packages of `pipeline`; by default of all that decide a result."""
    names = packages or {path.name for path in PIPELINE.iterdir()} - DECIDE_NOTHING
    digest = hashlib.sha256()
    for path in sorted(PIPELINE.rglob("*.py")):
        if (name := path.relative_to(PIPELINE)).parts[0] in names and path.is_file():  # an editor's lock is a link to nowhere
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, str | int]:
    """Processor, cores, accelerator and versions."""
    facts = {"processor": platform.processor(), "cores": os.cpu_count() or 1}
    facts |= {"python": platform.python_version(), "torch": version("torch")}
    sources = {"processor": ("cpuinfo", r"model name\s*: (.*)"), "gpu": ("driver/nvidia/gpus/*/information", r"Model:\s*(.*)")}
    for name, (file, pattern) in sources.items():
        for path in sorted(Path("/proc").glob(file))[:1]:
            if match := re.search(pattern, path.read_text()):
                facts[name] = match[1]
    return facts
