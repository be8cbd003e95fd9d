"""Which MLflow store is used. Import this before mlflow: it sets what MLflow reads when it is imported."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from pipeline.core.files import main_checkout

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # it logs a database's errors before it raises them
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


def masked(text: object) -> str:
    """`text` without the credentials in the store's address, or in any other."""
    text = str(text)
    if match := re.search(r"://[^:/@]*:(.+)@", tracking_uri()):
        for secret in {match[1], unquote(match[1])}:
            text = text.replace(secret, "***")
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return re.sub(r"(?i)((?:password|passwd|secret|token)=)[^&\s'\"]+", r"\1***", text)
