"""Is a small network, distilled from a big one, worth it? One file per stage of dvc.yaml; the packages are what stages call."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and not all(map(find_spec, ("psutil", "pydantic", "torch"))):
    sys.exit("error: the packages of requirements.txt are not installed here: make install, then source .venv/bin/activate")
