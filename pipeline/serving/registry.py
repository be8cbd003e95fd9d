"""MLflow's registry: the exported student, the version that is served, and on what evidence it is."""

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from pipeline.data.npy import read_npz
from pipeline.data.dataset import Dataset
from pipeline.core.errors import UserError
from pipeline.evaluation.statistics import Comparison, compare

NAME = "distilled-student"
CHAMPION, CHALLENGER = "champion", "challenger"


class Candidate(NamedTuple):
    """An exported student and what is known of it."""

    onnx: Path
    checkpoint_md5: str
    dataset: Dataset
    predictions: Path  # as evaluate writes them
    run_id: str  # the MLflow run that trained it
    accuracy: float  # of the exported model on the test images


class Registration(NamedTuple):
    """A version, its alias, and why it has it."""

    version: str
    alias: str
    reason: str


def register(client: MlflowClient, candidate: Candidate) -> Registration:
    """Register a student and give it its alias, once: a student that is registered already keeps what it has.

    The first version is the champion. A later one becomes champion only if it is better than the champion by the verdict of
    `statistics.compare` over all seeds and test images of both recipes; otherwise it is the challenger.
    """
    champion = by_alias(client, CHAMPION)
    for version in client.search_model_versions(f"name = '{NAME}'") if champion else []:
        if version.tags.get("checkpoint_md5") == candidate.checkpoint_md5:
            aliases = client.get_model_version(NAME, version.version).aliases
            return Registration(str(version.version), ", ".join(aliases) or "no alias", "registered before")
    alias, reason = CHAMPION, "the first version"
    if champion:
        alias, reason = judge(client, candidate, champion)
    version = _log(client, candidate)
    tags = {"checkpoint_md5": candidate.checkpoint_md5, "dataset": candidate.dataset.name, "verdict": reason}
    tags |= {"fingerprint": candidate.dataset.fingerprint, "test_accuracy": f"{candidate.accuracy:.4f}"}
    for key, value in tags.items():
        client.set_model_version_tag(NAME, version, key, value)
    client.set_registered_model_alias(NAME, alias, version)
    return Registration(version, alias, reason)


def judge(client: MlflowClient, candidate: Candidate, champion: ModelVersion) -> tuple[str, str]:
    """Which alias a candidate gets beside the present champion, and why."""
    if champion.tags.get("fingerprint") != candidate.dataset.fingerprint:
        return (
            CHALLENGER,
            f"version {champion.version} was measured on other data: promote by hand if this is the one to serve",
        )
    with tempfile.TemporaryDirectory() as folder:
        theirs = client.download_artifacts(champion.run_id, champion.tags["evidence"], folder)
        other = read_predictions(Path(theirs))
        ours = read_predictions(candidate.predictions)
        seeds = sorted(set(ours["seeds"].tolist()) & set(other["seeds"].tolist()))
        if not seeds:
            return CHALLENGER, f"no seed in common with version {champion.version}: they cannot be compared in pairs"
        one = compare(_right(ours, seeds), _right(other, seeds))
    return (CHAMPION if one.verdict == "better" else CHALLENGER), _in_words(one, champion.version)


def promote(client: MlflowClient, version: str) -> None:
    """Make a version the champion by hand. Raises UserError if there is none of that number."""
    try:
        client.get_model_version(NAME, version)
        client.set_registered_model_alias(NAME, CHAMPION, version)
    except MlflowException as error:
        raise UserError(f"{NAME} has no version {version!r}: {error.message}") from error


def by_alias(client: MlflowClient, alias: str) -> ModelVersion | None:
    """The version that carries an alias; None if none does."""
    try:
        return client.get_model_version_by_alias(NAME, alias)
    except MlflowException:
        return None


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """What `evaluate` wrote: `labels` (N,), `seeds` (S,) and `student_distilled` (S, N). Raises UserError for anything else."""
    said = read_npz(path, ("labels", "seeds", "student_distilled"))
    shapes = {name: array.shape for name, array in said.items() if array.dtype.kind in "iu"}
    if (
        len(shapes) < 3
        or shapes["student_distilled"] != shapes["seeds"] + shapes["labels"]
        or len(shapes["seeds"]) != 1
    ):
        raise UserError(f"{path}: not the predictions of a distilled student: {shapes}")
    return said


def _right(said: dict[str, np.ndarray], seeds: list[int]) -> np.ndarray:
    rows = [said["seeds"].tolist().index(seed) for seed in seeds]
    return said["student_distilled"][rows] == said["labels"]


def _in_words(one: Comparison, version: str) -> str:
    interval = f"95 % interval {100 * one.low:+.2f} to {100 * one.high:+.2f}"
    against = f"version {version}: {100 * one.gain:+.2f} points ({interval}), {one.seeds} seeds, {one.images} images"
    return (
        f"{one.verdict} than {against}"
        if one.verdict != "not distinguishable"
        else f"not distinguishable from {against}"
    )


def _log(client: MlflowClient, candidate: Candidate) -> str:
    """Log the model into the run that trained it and register it; the number of the new version."""
    mlflow.set_tracking_uri(client.tracking_uri)
    shape = candidate.dataset.image_shape
    # float64, since MLflow would cut 0.5 down to 0 for a whole-number type before the model could refuse it
    example = np.zeros((1, *shape))
    signature = ModelSignature(inputs=Schema([TensorSpec(np.dtype(np.float64), (-1, *shape))]))
    pinned = [f"{package}=={importlib.metadata.version(package)}" for package in ("mlflow", "numpy", "onnxruntime")]
    ended = client.get_run(candidate.run_id).info.end_time
    with mlflow.start_run(run_id=candidate.run_id):
        logged = mlflow.pyfunc.log_model(
            name="student",
            python_model=str(Path(__file__).with_name("served_student.py")),
            artifacts={"onnx": str(candidate.onnx)},
            signature=signature,
            input_example=example,
            pip_requirements=pinned,
            registered_model_name=NAME,
            metadata={"classes": json.dumps(candidate.dataset.classes)},
        )
        folder = f"evidence/{candidate.checkpoint_md5}"
        mlflow.log_artifact(str(candidate.predictions), folder)
    client.set_terminated(candidate.run_id, end_time=ended)  # the training took no longer for being registered
    evidence = f"{folder}/{candidate.predictions.name}"
    client.set_model_version_tag(NAME, logged.registered_model_version, "evidence", evidence)
    return str(logged.registered_model_version)
