"""Register the exported student in MLflow, as champion if it is better than the present one, else as challenger.

`make register`, after `dvc repro`. Says which version it became and why. The same student is not registered twice.
"""

from pathlib import Path

from pipeline.data.dataset import load_dataset
from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import read_json
from pipeline.params import load_params
from pipeline.serving.registry import NAME, Candidate, register
from pipeline.tracking.store import Store


def main() -> None:
    store = Store(load_params().tracking.experiment)
    checksum = read_json(Path("models/student/choice.json"))["checkpoint_md5"]
    run_id = store.run_of(checksum)
    if run_id is None:
        raise UserError(
            "the store does not know the student's training: dvc repro --single-item --force evaluate@distillation"
        )
    candidate = Candidate(
        onnx=Path("models/student/student.onnx"),
        checkpoint_md5=checksum,
        dataset=load_dataset(Path("data/distillation")),
        predictions=Path("metrics/predictions/distillation.npz"),
        run_id=run_id,
        accuracy=read_json(Path("metrics/export.json"))["student"]["accuracy"],
    )
    for path in (candidate.onnx, candidate.predictions):
        if not path.is_file():
            raise UserError(f"{path}: missing: run dvc repro first")
    done = register(store.client, candidate)
    print(f"{NAME} version {done.version}: {done.alias}, {done.reason}")


if __name__ == "__main__":
    run(main)
