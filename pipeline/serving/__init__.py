"""The model registry, the model server, and prediction on files."""

import pipeline.core.tracking_uri  # noqa: F401 (before any module here imports mlflow)
