"""Write the student as an ONNX file, which onnx_model describes and opens."""

import errno
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from pipeline.core.errors import user_error
from pipeline.core.files import write_atomic
from pipeline.export.onnx_model import batches, check_operators
from pipeline.networks.architectures import Classifier, build


class _Probabilities(nn.Module):
    """A classifier's probabilities, its logits divided by a temperature."""

    def __init__(self, classifier: Classifier, temperature: float) -> None:
        super().__init__()
        self.classifier, self.temperature = classifier, temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(images)
        return (logits if self.temperature == 1 else logits / self.temperature).softmax(dim=1)


def export_onnx(
    classifier: Classifier,
    image_shape: tuple[int, int, int],
    classes: list[str],
    path: Path,
    resize: str | None = None,
    temperature: float = 1.0,
) -> None:
    """Write a float32 model for images of `image_shape` (H, W, C), resized by the rule `resize`. Equal weights, equal bytes.

    Its logits are divided by `temperature`.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # advice to the exporter's authors
    # Images lie channels last, for which PyTorch exports ResNet's average pool with Range, whose work depends on values.
    ordinary = classifier.network.register_forward_pre_hook(lambda _, images: images[0].contiguous())
    with ordinary, warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            _Probabilities(classifier, temperature).eval(),
            (torch.zeros((2, *image_shape), dtype=torch.uint8),),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            opset_version=18,
            verbose=False,
        )
    properties = {"classes": json.dumps(classes), "temperature": str(temperature)} | ({"resize": resize} if resize else {})
    _save(program.model_proto, properties, path)


def check_export(architecture: str, arguments: dict[str, Any], image_shape: tuple[int, int, int], classes: int) -> None:
    """Raises UserError if a student of that architecture could not be exported, when all training had been for nothing."""
    *image_size, channels = image_shape
    wrong = f"student: {architecture} cannot be exported as an ONNX file that this project opens"
    with user_error(wrong, Exception, then="take another architecture"), tempfile.TemporaryDirectory() as folder:
        network = build(architecture, **arguments, in_channels=channels, image_size=image_size, num_classes=classes)
        names = [str(number) for number in range(classes)]
        export_onnx(Classifier(network, 0.5, 0.5), image_shape, names, Path(folder) / "student.onnx")


def quantize(source: Path, calibration: np.ndarray, path: Path) -> None:
    """Write an int8 version of the model in `source`, its ranges taken from the `calibration` images (N, H, W, C).

    Raises OSError where the disk is full, which ONNX Runtime does not notice while it writes: it fails in many ways at what it
    reads back.
    """
    logging.getLogger().setLevel(logging.ERROR)  # it advises a preparation that changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        copy, raw = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        shutil.copyfile(source, copy)  # it leaves files beside what it reads
        try:
            quantize_static(
                copy,
                raw,
                _Calibration(calibration),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MaxPool", "Relu", "Gemm", "MatMul"],
            )
            model = onnx.load(raw)
        except Exception as error:
            if shutil.disk_usage(folder).free < source.stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder) from error
            raise
    _save(model, {item.key: item.value for item in onnx.load(source).metadata_props}, path)


class _Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.inputs = ({"images": batch} for batch in batches(images))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def _save(model: onnx.ModelProto, properties: dict[str, str], path: Path) -> None:
    """Write `model` with these as its metadata, without the exporter's notes: source lines and paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    check_operators(model)
    write_atomic(path, model.SerializeToString(deterministic=True))
