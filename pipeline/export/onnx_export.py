"""Write the student as an ONNX file, which exported.py describes and opens."""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.export.onnx_model import BATCH, Student
from pipeline.core.files import write_atomic
from pipeline.networks.architectures import Classifier

OPSET = 18


class _Probabilities(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return torch.softmax(self.classifier(images), dim=1)


def export_onnx(classifier: Classifier, image_shape: tuple[int, int, int], classes: list[str], path: Path) -> None:
    """Write a float32 model for images of `image_shape` (H, W, C). Equal weights, equal bytes."""
    module = _Probabilities(classifier).eval()
    images = torch.zeros((2, *image_shape), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # advice to the exporter's authors
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            module,
            (images,),
            raw,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("N")}},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
            dynamo=True,
        )
        model = onnx.load(raw)
    _save(model, classes, path)


def quantize(source: Path, calibration: np.ndarray, classes: list[str], path: Path) -> None:
    """Write an int8 version of the model in `source`, its ranges taken from the `calibration` images (N, H, W, C).

    Raises UserError where ONNX Runtime, which does not notice a full disk, cannot read back what it wrote.
    """
    logging.getLogger().setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "int8.onnx"
        try:
            quantize_static(
                source,
                raw,
                _Calibration(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MaxPool", "Relu", "Gemm", "MatMul"],
            )
            model = onnx.load(raw)
        except DecodeError as error:
            raise UserError(
                f"no space left in {source.parent} or {folder}, it seems: what was written there reads back as {error}"
            ) from error
    _save(model, classes, path)


class _Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.batches: Iterator[np.ndarray] = iter(np.array_split(images, -(-len(images) // BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def _save(model: onnx.ModelProto, classes: list[str], path: Path) -> None:
    """Write `model` without what the exporter notes about itself: source lines and paths of this machine."""
    for node in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    onnx.helper.set_model_props(model, {"classes": json.dumps(classes)})
    onnx.checker.check_model(model)
    write_atomic(path, model.SerializeToString(deterministic=True))


def predict_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    """Probabilities, float32 of shape (N, K), of uint8 images of shape (N, H, W, C), by ONNX Runtime on the CPU."""
    return Student(path).probabilities(images)
