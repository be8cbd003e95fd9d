"""From bytes to runs: which MLflow runs made and measured a checkpoint.

    python -m pipeline.tracking.lineage models/distillation/teacher/seed0.safetensors     a checkpoint file
    python -m pipeline.tracking.lineage HEAD~3                                            the checkpoints of a git revision
    python -m pipeline.tracking.lineage warm-owl                                          those of a DVC experiment

Read only. A run of the file's bytes is found by their MD5, which is the one in dvc.lock, wherever the file came from.
"""

from pathlib import Path

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.params import load_params
from pipeline.tracking.store import Store

MODELS = "models"


def main(target: str) -> None:
    """Print every checkpoint of `target` with its runs."""
    checkpoints = {target: md5(Path(target))} if Path(target).is_file() else of_revision(target)
    store = Store(load_params().tracking.experiment)
    for path, checksum in checkpoints.items():
        print(f"{path}  {checksum}")
        lines = store.describe_runs(checksum)
        print(
            "\n".join(f"    {line}" for line in lines)
            or "    no run in this store: dvc repro --single-item --force evaluate"
        )


def of_revision(revision: str) -> dict[str, str]:
    """The MD5 of every checkpoint of a git revision or DVC experiment, by path. Raises UserError if there are none."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        files = DVCFileSystem(rev=revision).find(MODELS, detail=True)
    except (DvcException, SCMError, OSError) as error:
        raise UserError(f"{revision}: neither a file nor a git revision nor a DVC experiment here: {error}") from error
    found = {
        path.lstrip("/"): entry["dvc_info"]["md5"]
        for path, entry in sorted(files.items())
        if path.endswith(".safetensors") and "md5" in (entry.get("dvc_info") or {})
    }
    if not found:
        raise UserError(f"{revision}: its checkpoints are not in DVC's cache: dvc fetch, or repeat the experiment")
    return found


if __name__ == "__main__":
    run(main, target=None)
