"""The exported student, opened: ONNX Runtime and NumPy are enough.

Input `images`, uint8 of shape (N, H, W, C); output `probabilities`, float32 of shape (N, K). The class names, in the order of
the output's columns, are JSON in the file's metadata under `classes`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnxruntime import InferenceSession, SessionOptions

from pipeline.core.errors import UserError, user_error

if TYPE_CHECKING:
    import onnx

# What the exported networks consist of: nothing that loops, or makes much of little. The last two are of int8 versions.
OPERATORS = {"Add", "Cast", "Conv", "Div", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul", "ReduceMean"}
OPERATORS |= {"Relu", "Reshape", "Softmax", "Squeeze", "Sub", "Transpose", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}


class Student:
    """An ONNX file as stage export_student writes it: its `classes`, and the `shape` (H, W, C) of its images."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open `path` to compute with `threads` threads; 0: one per core. Raises UserError for anything but such a file."""
        self.path = path
        options = SessionOptions()
        options.intra_op_num_threads = threads
        wrong = f"{path}: damaged, or no exported student"
        # ONNX Runtime has a type of error for each status, and no common one.
        with user_error(wrong, Exception, then="dvc repro export_student"):
            self.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.classes = json.loads(self.session.get_modelmeta().custom_metadata_map["classes"])
            (images,), (output,) = self.session.get_inputs(), self.session.get_outputs()
            if (images.name, images.type, len(images.shape)) != ("images", "tensor(uint8)", 4):
                raise ValueError(f"its input is {images.name}, {images.type} of shape {images.shape}")
            self.shape = tuple(int(side) for side in images.shape[1:])
            if output.shape[1:] != [len(self.classes)] or {type(name) for name in self.classes} != {str}:
                raise ValueError(f"its output has shape {output.shape}, its classes are {self.classes}")

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 of shape (N, K), of uint8 images of shape (N, H, W, C), on the CPU. Raises UserError."""
        with user_error(f"{self.path}: cannot be run", Exception, then="dvc repro export_student"):
            return np.concatenate([self.session.run(None, {"images": batch})[0] for batch in batches(images)])


def open_foreign(path: Path) -> Student:
    """Open a file that someone else may have made. Raises UserError as Student, and for one that might compute forever."""
    import onnx

    with user_error(f"{path}: damaged, or no exported student", Exception, then="dvc repro export_student"):
        check_operators(onnx.load(path, load_external_data=False))
    return Student(path)


def check_operators(model: "onnx.ModelProto") -> None:
    """Raises UserError for operators that are not in OPERATORS, functions, and weights in other files."""
    used = {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in model.graph.node}
    if unknown := sorted(used - OPERATORS):
        raise UserError(f"it computes with {', '.join(unknown)}, which is not in OPERATORS of pipeline/export/onnx_model.py")
    if model.functions or any(tensor.external_data for tensor in model.graph.initializer):
        raise UserError("it has functions of its own, or weights in other files")


def batches(images: np.ndarray) -> list[np.ndarray]:
    """`images`, at least one, in parts of at most 250, the number that is computed at a time."""
    return np.array_split(images, -(-len(images) // 250))
