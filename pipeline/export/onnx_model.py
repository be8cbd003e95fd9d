"""The exported student, opened: ONNX Runtime, NumPy and Pillow are enough.

Input `images`, uint8 of shape (N, H, W, C); output `probabilities`, float32 of shape (N, K). The class names, in the order of
the output's columns, are JSON in the file's metadata under `classes`. Under `resize`, if it is known, is the rule by which images
get their size (pipeline/core/images.py); under `temperature` what the file divides the logits by before it takes probabilities.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnxruntime import InferenceSession, SessionOptions

from pipeline.core.errors import UserError, one_line, user_error
from pipeline.core.images import RULES

if TYPE_CHECKING:
    import onnx

MOST = 250  # images that are computed at a time
TRIAL_SECONDS, TRIAL_BYTES = 20, 4 * 2**30  # of processor time and address space for opening a foreign file and one batch
# What the exported networks consist of: nothing whose work depends on what an image shows. The last two are of int8 versions.
OPERATORS = {"Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "Div", "Flatten", "Gemm"}
OPERATORS |= {"GlobalAveragePool", "HardSigmoid", "HardSwish", "MatMul", "MaxPool", "Mul", "ReduceMean", "Relu", "Reshape"}
OPERATORS |= {"Sigmoid", "Softmax", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"}


class Student:
    """An ONNX file as stage export_student writes it: its `classes`, the `shape` (H, W, C) of its images, and their `resize`.

    `temperature` is what it divides its logits by already; 1 in older files.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open `path` to compute with `threads` threads; 0: one per core. Raises UserError for anything but such a file."""
        self.path = path
        options = SessionOptions()
        options.intra_op_num_threads = threads
        wrong = f"{path}: damaged, or no exported student"
        # ONNX Runtime has a type of error for each status, and no common one.
        with user_error(wrong, Exception, then="dvc repro export_student"):
            options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file's name ends in
            self.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.classes, self.resize = json.loads(metadata["classes"]), metadata.get("resize")
            self.temperature = float(metadata.get("temperature", 1))
            if not 0 < self.temperature < float("inf"):
                raise ValueError(f"its temperature is {self.temperature}")
            if self.resize not in (None, *RULES):
                raise ValueError(f"its images are resized by {self.resize!r}; known: {', '.join(RULES)}")
            (images,), (output,) = self.session.get_inputs(), self.session.get_outputs()
            if (images.name, images.type, len(images.shape)) != ("images", "tensor(uint8)", 4):
                raise ValueError(f"its input is {images.name}, {images.type} of shape {images.shape}")
            self.shape = tuple(int(side) for side in images.shape[1:])
            names = self.classes if isinstance(self.classes, list) and {*map(type, self.classes)} == {str} else []
            if (output.type, output.shape[1:]) != ("tensor(float)", [len(names)]) or not all(map(str.isprintable, names)):
                raise ValueError(f"its output is {output.type} of shape {output.shape}, its classes are {self.classes}")
            if len(set(names)) != len(names):
                raise ValueError(f"its classes are {names}: one stands twice")

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 of shape (N, K), of uint8 images of shape (N, H, W, C), on the CPU. Raises UserError."""
        with user_error(f"{self.path}: cannot be run", Exception, then="dvc repro export_student"):
            rows = np.concatenate([self.session.run(None, {"images": batch})[0] for batch in batches(images)])
            if rows.shape != (len(images), len(self.classes)):
                raise ValueError(f"it gives {rows.shape} for {len(images)} images and {len(self.classes)} classes")
            return rows


def open_foreign(path: Path) -> Student:
    """Open a file that someone else may have made, after a trial in a process of its own with little time and memory.

    Raises UserError as Student, for operators as `check_operators`, and for a file that takes more in the trial.
    """
    import onnx

    with user_error(f"{path}: damaged, or no exported student", Exception, then="dvc repro export_student"):
        check_operators(onnx.load(path, format="protobuf", load_external_data=False))
    command = [sys.executable, "-m", "pipeline.export.onnx_model", str(path.resolve())]
    options = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True, "timeout": 3 * TRIAL_SECONDS}
    limit = f"{path}: to open it and compute {MOST} images takes over {TRIAL_SECONDS} s or {TRIAL_BYTES / 2**30:.0f} GiB"
    with user_error(limit, subprocess.TimeoutExpired):
        tried = subprocess.run(command, **options, check=False)  # noqa: S603 (ourselves)
    if tried.returncode:
        raise UserError((tried.stderr.splitlines() or [limit])[-1])
    return Student(path)


def _try(path: Path) -> None:
    """Open a file and compute the largest batch within the limits: how much work that is does not depend on the pixels."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    try:
        student = Student(path)
        student.probabilities(np.zeros((MOST, *student.shape), np.uint8))
    except (UserError, MemoryError) as error:
        sys.exit(one_line(error))


def check_operators(model: "onnx.ModelProto") -> None:
    """Raises UserError for operators that are not in OPERATORS, functions, and weights that are sparse or in other files."""
    used = {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in model.graph.node}
    if unknown := sorted(used - OPERATORS):
        raise UserError(f"it computes with {', '.join(unknown)}, which is not in OPERATORS of pipeline/export/onnx_model.py")
    if model.functions or model.graph.sparse_initializer or any(tensor.external_data for tensor in model.graph.initializer):
        raise UserError("it has functions of its own, or weights that are sparse or in other files")


def batches(images: np.ndarray) -> list[np.ndarray]:
    """`images`, at least one, in parts of at most MOST."""
    return np.array_split(images, -(-len(images) // MOST))


if __name__ == "__main__":
    _try(Path(sys.argv[1]))
