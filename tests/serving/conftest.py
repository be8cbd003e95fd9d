"""A registry of one's own, and servers."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.core.files import md5, write_atomic
from pipeline.core.tracking_uri import tracking_uri
from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_export import export_onnx
from pipeline.networks.architectures import Classifier
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.serving.registry import register
from tests.checkout import wait_for
from tests.networks.conftest import ARGUMENTS, describe


class Registry:
    """A store with an experiment, and students of a wanted accuracy."""

    def __init__(self, folder: Path, data: TrainingData, classifier: Classifier, onnx: Path) -> None:
        self.folder, self.data, self.classifier, self.onnx = folder, data, classifier, onnx
        self.client = MlflowClient(tracking_uri())
        self.experiment = self.client.create_experiment("e", (folder / "mlartifacts").as_uri())

    def student(self, name: str, accuracy: float, first_seed: int = 0, **changed: Any) -> Path:
        """A checkout with a student, its data set changed as given, and its training's run in the store."""
        checkout, student = self.folder / name, self.folder / name / "models/exported/distillation/student.safetensors"
        save_checkpoint(student, self.classifier, describe(self.data.dataset.model_copy(update=changed), name))
        write_atomic(student.with_suffix(".onnx"), self.onnx.read_bytes())
        write_atomic(checkout / "metrics" / "distillation_export.json", json.dumps({"student": {"accuracy": accuracy}}))
        detail = {"models": {"student_distilled": {"checkpoints": [md5(student)]}}}
        detail["comparisons"] = {"student_distilled_vs_student_alone": {"metric": "accuracy", "margin": 0.0}}
        write_atomic(checkout / "metrics/detail/distillation.json", json.dumps(detail))
        wrong = np.random.default_rng(0).random((5, 2000)) > accuracy  # the same images are hard for every student
        arrays = {"labels": np.zeros(2000, dtype=np.int64), "seeds": np.arange(5) + first_seed}
        predictions = checkout / "metrics" / "predictions" / "distillation.npz"
        predictions.parent.mkdir()
        np.savez_compressed(predictions, **arrays, student_distilled=np.stack([~wrong, wrong], axis=2).astype(np.float32))
        run = self.client.create_run(self.experiment, tags={"training": name})
        self.client.set_terminated(run.info.run_id)
        return checkout

    def register(self, name: str, accuracy: float, **options: Any) -> tuple[str, str, str]:
        """Make a student and register it."""
        return register(self.client, "distillation", self.student(name, accuracy, **options))


@pytest.fixture(scope="session")
def exported(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    """An untrained student, and its ONNX file."""
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 0).eval()
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, path)
    return classifier, path


@pytest.fixture
def registry(store: Path, data: TrainingData, exported: tuple[Classifier, Path]) -> Registry:
    return Registry(store, data, *exported)


@contextlib.contextmanager
def running(port: int, *command: object, **options: Any) -> Iterator[None]:
    """A server, from when it answers on `port` of 127.0.0.1 until the block ends."""
    process = subprocess.Popen([str(word) for word in command], **options)
    try:
        wait_for(port, process)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)
