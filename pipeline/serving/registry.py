"""Register the exported student in MLflow, as champion if it is better than the present one, else as challenger.

`make register`, after `dvc repro`, prints the version's number, its alias and the reason. The same student is not registered
twice. To serve another version, give it the alias `champion` in MLflow's UI.
"""

import importlib.metadata
import json
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from sqlalchemy.exc import SQLAlchemyError

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import md5, read_json
from pipeline.core.tracking_uri import masked, tracking_uri
from pipeline.data.dataset import Dataset
from pipeline.data.npy import read_npz
from pipeline.evaluation.statistics import compare
from pipeline.networks.description import read_description

NAME = "distilled-student"
CHAMPION, CHALLENGER = "champion", "challenger"


class Candidate(NamedTuple):
    """An exported student, and where it comes from."""

    onnx: Path
    checkpoint_md5: str
    dataset: Dataset
    predictions: Path  # written by stage evaluate
    run_id: str  # of the training, in MLflow
    accuracy: float  # of the exported model on the test images


def main() -> None:
    """Register models/student."""
    warnings.filterwarnings("ignore", module="mlflow")  # advice on type hints
    student = Path("models/student")
    description = read_description(student / "student.safetensors")
    client = open_store()
    candidate = Candidate(
        onnx=student / "student.onnx",
        checkpoint_md5=md5(student / "student.safetensors"),
        dataset=description.dataset,
        predictions=Path("metrics/predictions/distillation.npz"),
        run_id=run_of(client, description.digest),
        accuracy=read_json(Path("metrics/export.json"))["student"]["accuracy"],
    )
    for path in (candidate.onnx, candidate.predictions):
        if not path.is_file():
            raise UserError(f"{path}: missing: run dvc repro first")
    version, alias, reason = register(client, candidate)
    print(f"{NAME} version {version}: {alias}, {reason}")


def open_store() -> MlflowClient:
    """A client of the tracking store. Raises UserError if there is none yet, and if it does not answer."""
    uri = tracking_uri()
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).is_file():
        raise UserError(f"MLflow store {uri}: there is none yet: run dvc repro first")
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        problem = masked(f"{uri}: {error}")
        raise UserError(f"MLflow store {problem}. Set MLFLOW_TRACKING_URI to a store that answers") from error
    return client


def run_of(client: MlflowClient, training: str) -> str:
    """The id of the MLflow run of a training, by its digest. Raises UserError if the store has none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.training = '{training}'", max_results=1)
    if not runs:
        raise UserError("the MLflow store has no run of the student's training: run make sync first")
    return runs[0].info.run_id


def register(client: MlflowClient, candidate: Candidate) -> tuple[str, str, str]:
    """Register a student, unless it is registered already: the version, its alias and the reason for the alias.

    The first version is the champion. A later one becomes champion only if it is better than the champion by the verdict of
    `statistics.compare` over all seeds and test images of both recipes; otherwise it is the challenger.
    """
    champion = by_alias(client, CHAMPION)
    for version in client.search_model_versions(f"name = '{NAME}'") if champion else []:
        if version.tags.get("checkpoint_md5") == candidate.checkpoint_md5:
            aliases = client.get_model_version(NAME, version.version).aliases
            return str(version.version), ", ".join(aliases) or "no alias", "registered before"
    alias, reason = judge(client, candidate, champion) if champion else (CHAMPION, "the first version")
    version = _log(client, candidate, reason)
    client.set_registered_model_alias(NAME, alias, version)
    return version, alias, reason


def by_alias(client: MlflowClient, alias: str) -> ModelVersion | None:
    """The version that has an alias; None if none has."""
    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException as error:
        if error.get_http_status_code() >= 500:
            raise
        return None


def judge(client: MlflowClient, candidate: Candidate, champion: ModelVersion) -> tuple[str, str]:
    """The alias that a candidate gets beside the present champion, and the reason."""
    against = f"version {champion.version}"
    if champion.tags.get("fingerprint") != candidate.dataset.fingerprint:
        return CHALLENGER, f"{against} was measured on other data: set the alias in MLflow's UI if this is to be served"
    with tempfile.TemporaryDirectory() as folder:
        evidence = client.download_artifacts(champion.run_id, champion.tags["evidence"], folder)
        theirs, ours = read_predictions(Path(evidence)), read_predictions(candidate.predictions)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return CHALLENGER, f"no seed in common with {against}: they cannot be compared in pairs"
    comparison = compare(np.stack([ours[seed] for seed in seeds]), np.stack([theirs[seed] for seed in seeds]))
    verdict = comparison.verdict
    relation = f"{verdict} {'from' if verdict == 'not distinguishable' else 'than'} {against}"
    gain, low, high = (f"{100 * share:+.2f}" for share in (comparison.gain, comparison.low, comparison.high))
    extent = f"{comparison.seeds} seeds, {comparison.images} images"
    reason = f"{relation}: {gain} points (95 % interval {low} to {high}), {extent}"
    return CHAMPION if verdict == "better" else CHALLENGER, reason


def read_predictions(path: Path) -> dict[int, np.ndarray]:
    """Which test images the distilled students of a `distillation.npz` classify correctly: by seed, bool of shape (N,).

    Stage evaluate writes `labels`, integers of shape (N,), `seeds`, integers of shape (S,), and `student_distilled`,
    probabilities of shape (S, N, K). Raises UserError for anything else.
    """
    arrays = read_npz(path, ("labels", "seeds", "student_distilled"))
    shapes = {name: (array.dtype.kind, *array.shape) for name, array in arrays.items()}
    match shapes:
        case {"labels": ("i", n), "seeds": ("i", s), "student_distilled": ("f", rows, columns, k)}:
            if (rows, columns) == (s, n) and k:
                correct = arrays["student_distilled"].argmax(axis=2) == arrays["labels"]
                return dict(zip(arrays["seeds"].tolist(), correct, strict=True))
    raise UserError(f"{path}: not the predictions of a distilled student: {shapes}: run dvc repro")


def _log(client: MlflowClient, candidate: Candidate, reason: str) -> str:
    """Log the model into the run that trained it and register it; the number of the new version."""
    folder = f"evidence/{candidate.checkpoint_md5}"
    client.log_artifact(candidate.run_id, str(candidate.predictions), folder)
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=client.get_run(candidate.run_id).info.experiment_id)
    logged = Model.log(  # as mlflow.pyfunc.log_model, which would need a run that is active, and end it once more
        artifact_path=None,
        name="student",
        flavor=mlflow.pyfunc,
        run_id=candidate.run_id,
        registered_model_name=NAME,
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"onnx": str(candidate.onnx)},
        # float64: of a whole-number type, MLflow would cut 0.5 down to 0 before the model could refuse it.
        input_example=np.zeros((1, *candidate.dataset.image_shape)),
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("mlflow", "numpy", "onnxruntime")],
        metadata={"classes": json.dumps(candidate.dataset.classes)},
        tags={
            "checkpoint_md5": candidate.checkpoint_md5,
            "dataset": candidate.dataset.name,
            "fingerprint": candidate.dataset.fingerprint,
            "test_accuracy": f"{candidate.accuracy:.4f}",
            "verdict": reason,
            "evidence": f"{folder}/{candidate.predictions.name}",
        },
    )
    return str(logged.registered_model_version)


if __name__ == "__main__":
    run(main)
