"""A store of one's own."""

from pathlib import Path
from typing import Any

import pytest

from tests.tracking.samples import COMMITTED


@pytest.fixture(autouse=True)
def store(tmp_path: Path, new_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The main checkout of a store of one's own, without runs."""
    (tmp_path / "mlflow.db").write_bytes(new_store)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "TRACK_LATER", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What params.yaml of the commit holds, as far as the records here know it."""
    values = dict(COMMITTED)
    monkeypatch.setattr("pipeline.tracking.mirror.committed_parameters", lambda _: values)
    return values
