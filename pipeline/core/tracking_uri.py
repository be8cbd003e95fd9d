"""Which MLflow store is used. Import this before mlflow: it sets what MLflow reads when it is imported."""

import os
from pathlib import Path

from pipeline.core.files import main_checkout

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
# A retry after a lost answer would create a second run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def tracking_uri() -> str:
    """The store: `MLFLOW_TRACKING_URI`, else SQLite in the main checkout, where temporary copies find it too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and not Path(path).is_absolute():
        return f"sqlite:///{main_checkout() / path}"
    return uri
