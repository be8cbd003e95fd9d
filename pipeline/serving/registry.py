"""Register the exported student in MLflow, as champion if it is better than the present one, else as challenger.

`make register`, after `dvc repro`, prints the version's number, its alias and the reason. The same student is not registered
twice. To serve another version, give it the alias `champion` in MLflow's UI.
"""

import json
import tempfile
import warnings
from importlib.metadata import version as installed
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import RunInfo
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


def main() -> None:
    """Register models/student."""
    warnings.filterwarnings("ignore", module="mlflow")  # advice on type hints
    version, alias, reason = register(open_store(), Path())
    print(f"{NAME} version {version}: {alias}, {reason}")


def open_store() -> MlflowClient:
    """A client of the tracking store. Raises UserError if there is none yet, and if it does not answer."""
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"MLflow store {uri}: there is none yet: run dvc repro first")
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"MLflow store {masked(f'{uri}: {error}')}. Set MLFLOW_TRACKING_URI to a store that answers") from error
    return client


def by_alias(client: MlflowClient, alias: str) -> ModelVersion | None:
    """The version that has an alias; None if none has."""
    for model in client.search_registered_models(f"name = '{NAME}'"):
        if alias in model.aliases:
            return client.get_model_version(NAME, model.aliases[alias])
    return None


def register(client: MlflowClient, checkout: Path) -> tuple[str, str, str]:
    """Register the student in `checkout`, unless it is registered: the version, its alias and the reason for the alias.

    The first version is the champion. A later one becomes champion only if it is better than the champion by the verdict of
    `statistics.compare` over all seeds and test images of both recipes; otherwise it is the challenger.
    """
    checkpoint = checkout / "models/student/student.safetensors"
    onnx, predictions = checkpoint.with_suffix(".onnx"), checkout / "metrics/predictions/distillation.npz"
    description, checksum = read_description(checkpoint), md5(checkpoint)
    dataset = description.dataset
    accuracy = read_json(checkout / "metrics/export.json")["student"]["accuracy"]
    for path in (onnx, predictions):
        if not path.is_file():
            raise UserError(f"{path}: missing: run dvc repro first")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.training = '{description.digest}'", max_results=1)
    if not runs:
        raise UserError("the MLflow store has no run of the student's training: run make sync first")
    champion = by_alias(client, CHAMPION)
    if champion is None:
        alias, reason = CHAMPION, "the first version"
    elif same := client.search_model_versions(f"name = '{NAME}' and tags.checkpoint_md5 = '{checksum}'"):
        aliases = client.get_model_version(NAME, same[0].version).aliases
        return str(same[0].version), ", ".join(aliases) or "no alias", "registered before"
    else:
        alias, reason = judge(client, champion, dataset.fingerprint, predictions)
    tags = {
        "checkpoint_md5": checksum,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "test_accuracy": f"{accuracy:.4f}",
        "verdict": reason,
        "evidence": f"evidence/{checksum}/{predictions.name}",
    }
    client.log_artifact(runs[0].info.run_id, str(predictions), f"evidence/{checksum}")
    version = _log(client, runs[0].info, onnx, dataset, tags)
    client.set_registered_model_alias(NAME, alias, version)
    return version, alias, reason


def judge(client: MlflowClient, champion: ModelVersion, fingerprint: str, predictions: Path) -> tuple[str, str]:
    """The alias that a candidate gets, measured on the data of `fingerprint`, beside the present champion, and the reason."""
    against = f"version {champion.version}"
    if champion.tags.get("fingerprint") != fingerprint:
        return CHALLENGER, f"{against} was measured on other data: set the alias in MLflow's UI if this is to be served"
    with tempfile.TemporaryDirectory() as folder:
        evidence = client.download_artifacts(champion.run_id, champion.tags["evidence"], folder)
        theirs, ours = read_predictions(Path(evidence)), read_predictions(predictions)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return CHALLENGER, f"no seed in common with {against}: they cannot be compared in pairs"
    comparison = compare(*(np.stack([correct[seed] for seed in seeds]) for correct in (ours, theirs)))
    relation = f"{comparison.verdict} {'from' if comparison.verdict == 'not distinguishable' else 'than'} {against}"
    gain, low, high = (f"{100 * share:+.2f}" for share in (comparison.gain, comparison.low, comparison.high))
    extent = f"(95 % interval {low} to {high}), {comparison.seeds} seeds, {comparison.images} images"
    return CHAMPION if comparison.verdict == "better" else CHALLENGER, f"{relation}: {gain} points {extent}"


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


def _log(client: MlflowClient, training: RunInfo, onnx: Path, dataset: Dataset, tags: dict[str, str]) -> str:
    """Log the model into the run of its training and register it; the number of the new version."""
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=training.experiment_id)
    logged = Model.log(  # as mlflow.pyfunc.log_model, which would need a run that is active, and end it once more
        artifact_path=None,
        name="student",
        flavor=mlflow.pyfunc,
        run_id=training.run_id,
        registered_model_name=NAME,
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"onnx": str(onnx)},
        # float64: of a whole-number type, MLflow would cut 0.5 down to 0 before the model could refuse it.
        input_example=np.zeros((1, *dataset.image_shape)),
        pip_requirements=[f"{name}=={installed(name)}" for name in ("mlflow", "numpy", "onnxruntime")],
        metadata={"classes": json.dumps(dataset.classes)},
        tags=tags,
    )
    return str(logged.registered_model_version)


if __name__ == "__main__":
    run(main)
