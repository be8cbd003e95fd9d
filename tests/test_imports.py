"""The order of the packages: `lint-imports` passes, and fails when a forbidden import is added."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "pipeline/evaluation/metrics.py": "import mlflow",
    "pipeline/core/files.py": "import pipeline.networks.inference",
    "pipeline/training/losses.py": "import pipeline.evaluation.metrics",
    "pipeline/training/loop.py": "import pydantic",
    "pipeline/serving/predict.py": "import pipeline.tracking.store",
    "benchmarks/peer.py": "import tests.conftest",
}


@pytest.mark.parametrize(("path", "line"), [("", ""), *FORBIDDEN.items()])
def test_imports_go_down(tmp_path: Path, path: str, line: str):
    for name in ("pipeline", "studies", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if path:
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if path else 0), done.stdout
