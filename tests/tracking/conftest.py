"""A store of one's own for every test."""

from pathlib import Path
from typing import Any

import pytest

from tests.tracking.samples import COMMITTED


@pytest.fixture(autouse=True)
def committed(store: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What params.yaml of the commit holds, as far as the records here know it."""
    values = dict(COMMITTED)
    monkeypatch.setattr("pipeline.tracking.mirror.committed_parameters", lambda _: values)
    return values
