"""Which MLflow runs made and measured a checkpoint. Read only.

    python -m pipeline.tracking.lineage models/distillation/teacher/seed0.safetensors     a checkpoint
    python -m pipeline.tracking.lineage models/exported/distillation/student.onnx         an exported model
    python -m pipeline.tracking.lineage HEAD~3                                            the checkpoints of a git revision
    python -m pipeline.tracking.lineage warm-owl                                          those of a DVC experiment

A run is found by the MD5 of the checkpoint's bytes, which is the one in dvc.lock, wherever the file comes from.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cli import run
from pipeline.core.errors import UserError, user_error
from pipeline.core.files import md5, read_json
from pipeline.params import load_params
from pipeline.tracking.mirror import CHECKPOINT, COMMIT, EXPERIMENT, STAGE
from pipeline.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run


def main(target: str) -> None:
    """Print every checkpoint of `target` with its runs."""
    if target.endswith((".safetensors", ".onnx")) and not Path(target).is_file():
        raise UserError(f"{target}: missing: dvc repro, or dvc checkout")
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
    choice = path.with_name("choice.json")
    with user_error(f"{choice}: does not say what was exported", KeyError, then="dvc repro export_student"):
        content = read_json(choice)
        if path.name.startswith("teacher"):
            content = content["teacher"]
        return {f"{path}, of {content['checkpoint']}": content["checkpoint_md5"]}


def of_revision(revision: str) -> dict[str, str]:
    """The MD5 of every checkpoint of a git revision or DVC experiment, by path. Raises UserError if there are none."""
    from dvc.api import DVCFileSystem

    wrong = f"{revision}: neither a file nor a git revision nor a DVC experiment with checkpoints in DVC's cache"
    with user_error(wrong, Exception, then="dvc fetch may bring them"):
        files = DVCFileSystem(rev=revision).find("models", detail=True)
        if paths := sorted(path for path in files if path.endswith(".safetensors")):
            return {path: files[path]["md5"] for path in paths}
        raise FileNotFoundError("no checkpoints in models/")


def describe(run: "Run") -> str:
    """A run in a line."""
    tags, accuracy = run.data.tags, run.data.metrics.get("test_accuracy")
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.start_time / 1000))
    facts = {"commit": tags.get(COMMIT, "unknown")[:12], "stage": tags.get(STAGE), "experiment": tags.get(EXPERIMENT)}
    facts["test accuracy"] = "not measured" if accuracy is None else f"{accuracy:.4f}"
    head = f"{run.info.run_name}, run {run.info.run_id}, {run.info.status.lower()}, {started}"
    return ", ".join([head, *(f"{name} {value}" for name, value in facts.items() if value)])


if __name__ == "__main__":
    run(main, target=None)
