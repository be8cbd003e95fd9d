"""Is a small network, distilled from a big one, worth it? One file per stage of dvc.yaml; the packages are what stages call."""

import gc
import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"]:
    gc.set_threshold(10_000)  # not 700: what imports make stays, and was looked through for 0.8 of 4.7 s, all libraries imported
    needed, remedy = ("psutil", "pydantic", "torch"), "make install, then source .venv/bin/activate"
    if {"pipeline.serving.predict", "pipeline.export.onnx_model"} & {*sys.orig_argv}:  # and what it tries a file by
        needed, remedy = ("numpy", "onnxruntime", "PIL"), "pip install onnxruntime numpy pillow"
    if missing := [name for name in needed if not find_spec(name)]:
        sys.exit(f"error: {', '.join(missing)}: not installed here: {remedy}")
