"""Which code on which machine: for tags and reports."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def commit() -> str:
    """The git commit that the code comes from; in an experiment's temporary copy, that of the user's checkout."""
    return os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")


def code_is_committed() -> bool:
    """Whether pipeline/ and dvc.yaml are as in the commit."""
    return not _git("status", "--porcelain", "--", "pipeline", "dvc.yaml")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 (git)


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
