"""Which MLflow store is used. Import this before mlflow: it sets what MLflow reads when it is imported."""

import os
import re
from urllib.parse import unquote

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # it logs a database's errors before it raises them
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # a retry after a lost answer would create a second run


def tracking_uri() -> str:
    """The store: `MLFLOW_TRACKING_URI`, else SQLite in the main checkout, where temporary copies find it too."""
    from pipeline.core.files import main_checkout  # needs packages that serving.predict does without

    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{main_checkout() / path}"


def store_problem(error: Exception) -> str | None:
    """The message for what MLflow raises of a store that goes away, refuses or is damaged; None for any other error."""
    from_store = type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy")
    return f"the MLflow store refuses, or does not answer: {error}" if from_store else None


def masked(text: object) -> str:
    """`text` without the credentials in the store's address, or in any other."""
    text = str(text)
    if match := re.search(r"://[^:/@]*:(.+)@", os.environ.get("MLFLOW_TRACKING_URI", "")):
        for secret in {match[1], unquote(match[1])}:
            text = text.replace(secret, "***")
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return re.sub(r"(?i)((?:password|passwd|secret|token)=)[^&\s'\"]+", r"\1***", text)
