"""A small training."""

from pathlib import Path

import pytest

from pipeline.training.recipe import Recipe, train
from tests.conftest import prepare_npz

KD = {"name": "kd", "temperature": 5.0, "alpha": 0.7, "divergence": "forward"}
SETTINGS = {"epochs": 2, "batch_size": 64, "lr": 0.01, "precision": "fp32"}


@pytest.fixture
def teacher(tmp_path: Path) -> Recipe:
    """A teacher's recipe; its data are prepared in tmp_path / "data"."""
    prepare_npz(tmp_path / "data")
    return Recipe("teacher", "compact_cnn", {"width": 4, "hidden": 8}, SETTINGS, 0, tmp_path / "data", "cpu")


def trained(recipe: Recipe, root: Path) -> Path:
    """Carry out a training, or find it; its checkpoint."""
    return train(recipe, root, lambda record: None)
