"""Which code on which machine: for tags and reports."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml


def commit() -> str:
    """The git commit that the code comes from; in an experiment's temporary copy, that of the user's checkout."""
    return os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")


def code_is_committed() -> bool:
    """Whether pipeline/ and dvc.yaml are as in the commit."""
    return not _git("status", "--porcelain", "--", "pipeline", "dvc.yaml")


def _git(*arguments: str) -> str:
    """What git says in the checkout that this code lies in, wherever the stage runs."""
    command = ["git", *arguments]
    checkout = Path(__file__).parents[1]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 (git)


def changed_settings() -> list[str]:
    """Where params.yaml differs from the commit's, as arguments of `dvc exp run -S`."""
    committed = yaml.safe_load(_git("show", f"{commit()}:./params.yaml")) or {}
    present = yaml.safe_load(Path("params.yaml").read_text()) if Path("params.yaml").exists() else {}
    before, now = dict(_leaves(committed)), dict(_leaves(present))
    return [f"{key}={json.dumps(value)}" for key, value in now.items() if before.get(key) != value]


def _leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def machine() -> dict[str, str | int]:
    """Processor, cores, accelerator and versions."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    found = {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
