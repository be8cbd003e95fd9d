"""Is a small network, distilled from a big one, worth it? One file per stage of dvc.yaml; the packages are what stages call."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"]:
    needed, remedy = ("psutil", "pydantic", "torch"), "make install, then source .venv/bin/activate"
    if "pipeline.serving.predict" in sys.orig_argv:  # no other command does with so little
        needed, remedy = ("numpy", "onnxruntime", "PIL"), "pip install onnxruntime numpy pillow"
    if missing := [name for name in needed if not find_spec(name)]:
        sys.exit(f"error: {', '.join(missing)}: not installed here: {remedy}")
