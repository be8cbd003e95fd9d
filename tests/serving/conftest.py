"""A registry of one's own."""

from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline.core.tracking_uri import tracking_uri
from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_export import export_onnx
from pipeline.networks.checkpoints import new_classifier
from pipeline.serving.registry import NAME, Candidate, run_of


class Registry:
    """A store with an experiment, and candidates of a wanted accuracy."""

    def __init__(self, folder: Path, data: TrainingData) -> None:
        self.folder = folder
        self.data = data
        self.client = MlflowClient(tracking_uri())
        self.experiment = self.client.create_experiment("e", (folder / "mlartifacts").as_uri())
        self.onnx = folder / "student.onnx"
        classifier = new_classifier("compact_cnn", {"width": 4, "hidden": 8}, data.dataset, 0).eval()
        export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, self.onnx)

    def candidate(self, name: str, accuracy: float, **changed: object) -> Candidate:
        random = np.random.default_rng(0)  # the same images are hard for every candidate
        wrong = random.random((5, 2000)) > accuracy
        probabilities = np.stack([~wrong, wrong], axis=2).astype(np.float32)
        predictions = self.folder / name / "distillation.npz"
        predictions.parent.mkdir()
        labels = np.zeros(2000, dtype=np.int64)
        np.savez_compressed(predictions, labels=labels, seeds=np.arange(5), student_distilled=probabilities)
        run = self.client.create_run(self.experiment, tags={"training": name})
        self.client.set_terminated(run.info.run_id)
        run_id = run_of(self.client, name)
        return Candidate(self.onnx, name, self.data.dataset, predictions, run_id, accuracy)._replace(**changed)

    def aliases(self) -> dict[str, str]:
        return {alias: str(version) for alias, version in self.client.get_registered_model(NAME).aliases.items()}


@pytest.fixture
def registry(tmp_path: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(tmp_path, data)
