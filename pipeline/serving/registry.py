"""Register the exported student in MLflow, as champion if it is better than the present one, else as challenger.

`make register`, after `dvc repro`, prints the version's number, its alias and the reason. The same student is not registered
twice. To serve another version, give it the alias `champion` in MLflow's UI.
"""

import tempfile
import warnings
from importlib.metadata import version as installed
from pathlib import Path

import mlflow.onnx
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import RunInfo
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Schema, TensorSpec
from sqlalchemy.exc import SQLAlchemyError

from pipeline.core.cli import run
from pipeline.core.errors import UserError, user_error
from pipeline.core.files import digest, md5, read_json
from pipeline.core.tracking_uri import masked, tracking_uri
from pipeline.data.dataset import Dataset
from pipeline.data.npy import read_npz
from pipeline.evaluation.statistics import compare
from pipeline.export.onnx_model import Student, open_foreign
from pipeline.networks.description import read_description
from pipeline.params import TRACKS
from pipeline.reporting.tables import difference, unit
from pipeline.serving import refuse_folds

NAMES = {"baselines": "distilled-simple-cnn", "distillation": "distilled-student"}  # of the registered models, by track
CHAMPION, CHALLENGER = "champion", "challenger"
ONNX = "onnx_sha256"  # tag of a version: the digest of its file


def main(track: str = "distillation") -> None:
    """Register the student in models/exported/<track>."""
    warnings.filterwarnings("ignore", module="mlflow")  # advice on type hints
    version, alias, reason = register(open_store(), track, Path())
    print(f"{NAMES[track]} version {version}: {alias}, {reason}")


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


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version of a registered model that has an alias; None if none has."""
    for model in client.search_registered_models(f"name = '{name}'"):
        if alias in model.aliases:
            return client.get_model_version(name, model.aliases[alias])
    return None


def register(client: MlflowClient, track: str, checkout: Path) -> tuple[str, str, str]:
    """Register a track's student in `checkout`, unless it is registered: the version, its alias and the reason for the alias.

    The first version is the champion. A later one becomes champion only if it is better than the champion by the verdict of
    `statistics.compare` over all seeds and test images of both recipes; otherwise it is the challenger.
    """
    name, model = NAMES[track], TRACKS[track].distilled
    checkpoint = checkout / "models/exported" / track / "student.safetensors"
    exported, predictions = checkpoint.with_suffix(".onnx"), checkout / f"metrics/predictions/{track}.npz"
    for path in (checkpoint, exported, predictions):
        if not path.is_file():
            raise UserError(f"{path}: missing: dvc repro report@{track}, or dvc exp apply an experiment that has run it")
    description, checksum = read_description(checkpoint), md5(checkpoint)
    refuse_folds(description.dataset.folds, checkpoint, track)
    dataset, evaluation = description.dataset, read_json(checkout / f"metrics/detail/{track}.json")
    with user_error(f"metrics/detail/{track}.json: damaged", KeyError, TypeError, StopIteration):
        measured, answer = evaluation["models"][model]["checkpoints"], next(iter(evaluation["comparisons"].values()))
        metric, margin = answer["metric"], answer["margin"]
    if checksum not in measured:
        raise UserError(f"{predictions}: of other checkpoints than {checkpoint}: dvc repro report@{track} first")
    open_foreign(exported)  # or what the registry gets cannot be served
    accuracy = read_json(checkout / f"metrics/{track}_export.json")["student"]["accuracy"]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.training = '{description.digest}'", max_results=1)
    if not runs:
        raise UserError("the MLflow store has no run of the student's training: run make sync first")
    champion = by_alias(client, name, CHAMPION)
    onnx_digest = digest(exported, "sha256")
    both = f"tags.checkpoint_md5 = '{checksum}' and tags.{ONNX} = '{onnx_digest}'"
    if same := client.search_model_versions(f"name = '{name}' and {both}"):
        aliases = client.get_model_version(name, same[0].version).aliases
        return str(same[0].version), ", ".join(aliases) or "no alias", "registered before"
    if champion is None:
        alias, reason = CHAMPION, "the first version"
    else:
        alias, reason = judge(client, champion, dataset.fingerprint, predictions, model, metric, margin)
    tags = {
        "checkpoint_md5": checksum,
        ONNX: onnx_digest,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "test_accuracy": f"{accuracy:.4f}",
        "verdict": reason,
        "evidence": f"evidence/{checksum}/{predictions.name}",
    }
    client.log_artifact(runs[0].info.run_id, str(predictions), f"evidence/{checksum}")
    version = _log(client, name, runs[0].info, exported, dataset, tags)
    client.set_registered_model_alias(name, alias, version)
    return version, alias, reason


def judge(
    client: MlflowClient, champion: ModelVersion, fingerprint: str, predictions: Path, model: str, metric: str, margin: float
) -> tuple[str, str]:
    """The alias that a candidate `model`, measured on the data of `fingerprint`, gets beside the present champion, and why.

    `metric` and `margin` as in `statistics.Comparison`.
    """
    against = f"version {champion.version}"
    if champion.tags.get("fingerprint") != fingerprint:
        return CHALLENGER, f"{against} was measured on other data: set the alias in MLflow's UI if this is to be served"
    labels, ours = read_predictions(predictions, model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _, theirs = read_predictions(
                Path(client.download_artifacts(champion.run_id, champion.tags["evidence"], folder)), model
            )
    except (UserError, KeyError, MlflowException, OSError) as error:
        return CHALLENGER, f"the predictions of {against} cannot be read: {masked(error)}"
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return CHALLENGER, f"no seed in common with {against}: they cannot be compared in pairs"
    both = (np.stack([predictions[seed] for seed in seeds]) for predictions in (ours, theirs))
    patients = read_npz(predictions, ["patients"]).get("patients")
    comparison = compare(labels, *both, metric, margin, patients)
    words = {"undecided": "undecided whether better than", "equivalent": "equivalent to"}
    relation = f"{words.get(comparison.verdict, f'{comparison.verdict} than')} {against}"
    gain, low, high = (difference(metric, value) for value in (comparison.gain, comparison.low, comparison.high))
    extent = f"(95 % interval {low} to {high}), {comparison.seeds} seeds, {comparison.images} images"
    alias = CHAMPION if comparison.verdict.startswith("better") else CHALLENGER
    return alias, f"{relation}: {gain} {unit(metric)} {extent}"


def read_predictions(path: Path, model: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The labels, (N,), in a metrics/predictions/<track>.npz and, by seed, a model's probabilities, (N, K).

    Stage evaluate writes `labels`, integers of shape (N,), `seeds`, integers of shape (S,), and under the model's name
    probabilities of shape (S, N, K). Raises UserError for anything else.
    """
    arrays = read_npz(path, ("labels", "seeds", model))
    shapes = {name: (array.dtype.kind, *array.shape) for name, array in arrays.items()}
    match shapes:
        case {"labels": ("i", n), "seeds": ("i", s), **others}:
            kind, *shape = others.get(model, ("", 0))
            if kind == "f" and shape[:2] == [s, n] and len(shape) == 3 and shape[2] and np.isfinite(arrays[model]).all():
                return arrays["labels"], dict(zip(arrays["seeds"].tolist(), arrays[model], strict=True))
    raise UserError(f"{path}: not the predictions of a distilled student: {shapes}: run dvc repro")


def _log(client: MlflowClient, name: str, training: RunInfo, exported: Path, dataset: Dataset, tags: dict[str, str]) -> str:
    """Log the model into the run of its training and register it; the number of the new version."""
    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=training.experiment_id)
    images = TensorSpec(np.dtype(np.uint8), (-1, *dataset.image_shape), "images")
    probabilities = TensorSpec(np.dtype(np.float32), (-1, len(dataset.classes)), "probabilities")
    logged = Model.log(  # as mlflow.onnx.log_model, which would need a run that is active, and end it once more
        artifact_path=None,
        name="student",
        flavor=mlflow.onnx,
        run_id=training.run_id,
        registered_model_name=name,
        onnx_model=onnx.load(exported),
        save_as_external_data=False,
        signature=ModelSignature(Schema([images]), Schema([probabilities])),
        pip_requirements=[f"{name}=={installed(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")],
        tags=tags,
    )
    return str(logged.registered_model_version)


def open_champion(client: MlflowClient, track: str, folder: Path) -> tuple[str, Student]:
    """The number of the version that is a track's champion, and its model, downloaded into `folder`.

    Raises UserError if there is no champion, and if the store holds anything but the file that was registered.
    """
    name = NAMES[track]
    champion = by_alias(client, name, CHAMPION)
    if champion is None:
        raise UserError(f"no {CHAMPION} of {name} in the registry: dvc repro report@{track}, then make register TRACK={track}")
    mlflow.set_tracking_uri(client.tracking_uri)
    address, advice = f"models:/{name}/{champion.version}/model.onnx", "register the student again, or serve another version"
    with user_error(f"{address}: no model that this project registered", Exception, then=advice):
        path = Path(mlflow.artifacts.download_artifacts(address, dst_path=str(folder)))
        if digest(path, "sha256") != champion.tags.get(ONNX):
            raise ValueError(f"its SHA-256 is not the one in the version's tag {ONNX}")
    return str(champion.version), open_foreign(path)


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
