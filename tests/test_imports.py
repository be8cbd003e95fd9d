"""The order of the packages: `lint-imports` (make lint) names every forbidden import that is added."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

FORBIDDEN = {
    "pipeline/evaluation/metrics.py": "mlflow",
    "pipeline/core/files.py": "pipeline.networks.inference",
    "pipeline/training/losses.py": "pipeline.evaluation.metrics",
    "pipeline/training/loop.py": "pydantic",
    "pipeline/serving/predict.py": "pipeline.tracking.store",
    "benchmarks/peer.py": "tests.conftest",
}


def test_imports_go_down(tmp_path: Path):
    for name in ("pipeline", "studies", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, module in FORBIDDEN.items():
        with (tmp_path / path).open("a") as file:
            file.write(f"\nimport {module}\n")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    named = set(re.findall(r"- +([\w.]+) -> ([\w.]+)", done.stdout))
    assert named == {(path.removesuffix(".py").replace("/", "."), module) for path, module in FORBIDDEN.items()}, done.stdout
