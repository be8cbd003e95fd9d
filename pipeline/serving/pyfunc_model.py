"""The student as an MLflow model: raw images in, class names and probabilities out. MLflow keeps this file with the model.

Needs MLflow, NumPy and ONNX Runtime, nothing of this project.
"""

import json

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Student(PythonModel):
    """Artifact `onnx`: a file as written by stage export_student."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the ONNX file: MLflow calls this once."""
        from onnxruntime import InferenceSession

        self.session = InferenceSession(context.artifacts["onnx"], providers=["CPUExecutionProvider"])
        self.classes = json.loads(self.session.get_modelmeta().custom_metadata_map["classes"])
        self.shape = tuple(self.session.get_inputs()[0].shape[1:])

    def predict(self, context, model_input, params=None):
        """Class and probabilities of each image; whole numbers from 0 to 255, shape (N, H, W, C). MlflowException for others."""
        images = np.asarray(model_input)
        if images.ndim != 4 or images.shape[1:] != self.shape or not len(images):
            shape = f"(N, {', '.join(map(str, self.shape))})"
            raise MlflowException.invalid_parameter_value(f"images must have shape {shape}, not {images.shape}")
        # Scaled images (0-1) would otherwise all be black.
        if not ((images >= 0) & (images <= 255) & (images == np.floor(images))).all():
            extent = f"these are from {images.min()} to {images.max()}"
            raise MlflowException.invalid_parameter_value(f"pixels must be whole numbers from 0 to 255; {extent}")
        batches = np.array_split(images.astype(np.uint8), -(-len(images) // 250))
        rows = np.concatenate([self.session.run(None, {"images": batch})[0] for batch in batches])
        named = [dict(zip(self.classes, row.tolist(), strict=True)) for row in rows]
        return [{"class": max(row, key=row.get), "probabilities": row} for row in named]


set_model(Student())
