"""Which MLflow runs made and measured a checkpoint. Read only.

    python -m pipeline.tracking.lineage models/distillation/teacher/seed0.safetensors     a checkpoint
    python -m pipeline.tracking.lineage models/student/student.onnx                       an exported student
    python -m pipeline.tracking.lineage HEAD~3                                            the checkpoints of a git revision
    python -m pipeline.tracking.lineage warm-owl                                          those of a DVC experiment

A run is found by the MD5 of the checkpoint's bytes, which is the one in dvc.lock, wherever the file comes from.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import md5, read_json
from pipeline.params import load_params
from pipeline.tracking.mirror import CHECKPOINT, COMMIT, EXPERIMENT, STAGE
from pipeline.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run


def main(target: str) -> None:
    """Print every checkpoint of `target` with its runs."""
    checkpoints = of_file(Path(target)) if Path(target).is_file() else of_revision(target)
    client, experiment = open_store(load_params().tracking.experiment)
    for path, checksum in checkpoints.items():
        print(f"{path}  {checksum}")
        runs = client.search_runs([experiment], f"tags.{CHECKPOINT} = '{checksum}'")
        print("\n".join(f"    {describe(run)}" for run in runs) or "    no run in this store: make sync")


def of_file(path: Path) -> dict[str, str]:
    """The MD5 of a checkpoint, or of the one that an ONNX file was made of. Raises UserError if that is not known."""
    if path.suffix != ".onnx":
        return {str(path): md5(path)}
    choice = read_json(path.with_name("choice.json"))
    if "checkpoint_md5" not in choice:
        raise UserError(f"{path.with_name('choice.json')}: does not say what was exported: dvc repro export_student")
    return {f"{path}, of {choice.get('checkpoint')}": choice["checkpoint_md5"]}


def of_revision(revision: str) -> dict[str, str]:
    """The MD5 of every checkpoint of a git revision or DVC experiment, by path. Raises UserError if there are none."""
    from dvc.api import DVCFileSystem
    from dvc_data.index import DataIndexDirError

    try:
        files = DVCFileSystem(rev=revision).find("models", detail=True)
    except DataIndexDirError:
        files = {}
    except Exception as error:
        raise UserError(f"{revision}: neither a file nor a git revision nor a DVC experiment here: {error}") from error
    checksums = {path: entry.get("md5") for path, entry in sorted(files.items()) if path.endswith(".safetensors")}
    if not checksums:
        raise UserError(f"{revision}: its checkpoints are not in DVC's cache: dvc fetch, or repeat the experiment")
    return checksums


def describe(run: "Run") -> str:
    """A run in a line."""
    tags, accuracy = run.data.tags, run.data.metrics.get("test_accuracy")
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000))
    facts = [run.info.run_name, f"run {run.info.run_id}", run.info.status.lower(), started]
    origin = {"commit": tags.get(COMMIT, "unknown")[:12], "stage": tags.get(STAGE), "experiment": tags.get(EXPERIMENT)}
    facts += [f"{name} {value}" for name, value in origin.items() if value]
    return ", ".join([*facts, "not measured" if accuracy is None else f"test accuracy {accuracy:.4f}"])


if __name__ == "__main__":
    run(main, target=None)
