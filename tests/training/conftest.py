"""A small training."""

from pathlib import Path

import pytest

from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.training.recipe import Recipe

SETTINGS = {"epochs": 2, "batch_size": 64, "lr": 0.01, "precision": "fp32"}


@pytest.fixture
def teacher(npz: Path, tmp_path: Path) -> Recipe:
    """A teacher's recipe; its data are prepared in tmp_path / "data"."""
    prepare(read_source(str(npz)), 0.1, tmp_path / "data")
    return Recipe("teacher", "compact_cnn", {"width": 4, "hidden": 8}, SETTINGS, 0, tmp_path / "data", "cpu")
