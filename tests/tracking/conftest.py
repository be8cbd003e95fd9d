"""A store of one's own."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.store import _create_sqlite
from tests.tracking.samples import COMMITTED


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The main checkout of a store of one's own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "TRACK_LATER", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SQLite store without an experiment: MLflow takes seconds to create one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    _create_sqlite(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture(autouse=True)
def committed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What params.yaml of the commit holds, as far as the records here know it."""
    values = dict(COMMITTED)
    monkeypatch.setattr("pipeline.tracking.mirror.committed_parameters", lambda _: values)
    return values
