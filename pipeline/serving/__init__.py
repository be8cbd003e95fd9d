"""The model registry, the model server, and prediction on files."""

from pathlib import Path

import pipeline.core.tracking_uri  # noqa: F401 (before any module here imports mlflow)
from pipeline.core.errors import UserError


def refuse_folds(folds: int | None, path: Path, track: str) -> None:
    """Raises UserError for a student at `path` of a cross-validation: it has not seen all training images."""
    if folds:
        raise UserError(f"{path}: of a cross-validation, trained on a part of the images: train it with {track}.folds: null")
