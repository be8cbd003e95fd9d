"""Write the student as an ONNX file, which onnx_model describes and opens."""

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from pipeline.core.errors import user_error
from pipeline.core.files import write_atomic
from pipeline.export.onnx_model import batches, check_operators
from pipeline.networks.architectures import Classifier, build


def export_onnx(
    classifier: Classifier, image_shape: tuple[int, int, int], classes: list[str], path: Path, resize: str | None = None
) -> None:
    """Write a float32 model for images of `image_shape` (H, W, C), resized by the rule `resize`. Equal weights, equal bytes."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # advice to the exporter's authors
    # Images lie channels last, for which PyTorch exports ResNet's average pool with Range, whose work depends on values.
    ordinary = classifier.network.register_forward_pre_hook(lambda _, images: images[0].contiguous())
    with ordinary, warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            nn.Sequential(classifier, nn.Softmax(dim=1)).eval(),
            (torch.zeros((2, *image_shape), dtype=torch.uint8),),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=18,
            verbose=False,
        )
    _save(program.model_proto, classes, path, resize)


def check_export(architecture: str, arguments: dict[str, Any], image_shape: tuple[int, int, int], classes: int) -> None:
    """Raises UserError if a student of that architecture could not be exported, when all training had been for nothing."""
    *image_size, channels = image_shape
    wrong = f"student: {architecture} cannot be exported as an ONNX file that this project opens"
    with user_error(wrong, Exception, then="take another architecture"), tempfile.TemporaryDirectory() as folder:
        network = build(architecture, **arguments, in_channels=channels, image_size=image_size, num_classes=classes)
        names = [str(number) for number in range(classes)]
        export_onnx(Classifier(network, 0.5, 0.5), image_shape, names, Path(folder) / "student.onnx")


def quantize(source: Path, calibration: np.ndarray, classes: list[str], path: Path, resize: str | None = None) -> None:
    """Write an int8 version of the model in `source`, its ranges taken from the `calibration` images (N, H, W, C).

    Raises UserError where ONNX Runtime, which does not notice a full disk, cannot read back what it wrote.
    """
    logging.getLogger().setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "int8.onnx"
        with user_error(
            f"no space left in {source.parent} or {folder}, it seems: what was written there reads back as", DecodeError
        ):
            quantize_static(
                source,
                raw,
                _Calibration(calibration),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MaxPool", "Relu", "Gemm", "MatMul"],
            )
            model = onnx.load(raw)
    _save(model, classes, path, resize)


class _Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.inputs = ({"images": batch} for batch in batches(images))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def _save(model: onnx.ModelProto, classes: list[str], path: Path, resize: str | None) -> None:
    """Write `model` without what the exporter notes about itself: source lines and paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, {"classes": json.dumps(classes)} | ({"resize": resize} if resize else {}))
    onnx.checker.check_model(model)
    check_operators(model)
    write_atomic(path, model.SerializeToString(deterministic=True))
