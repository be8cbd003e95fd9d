"""The MLflow store: opened by several processes at once, and with errors that show no password."""

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from pipeline.core.errors import UserError
from pipeline.core.files import main_checkout, write_atomic
from pipeline.core.tracking_uri import masked, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the address of a run may hold a password
TEMPORARY = (401, 403, 408, 429)  # HTTP's 4xx that another day may see otherwise


class NoAnswerError(UserError):
    """The store cannot be reached or answers with an error of its own: it may answer later."""


def store_lock() -> FileLock:
    """A lock that this checkout's processes share, for what is looked for first and created if it is missing."""
    return FileLock(main_checkout() / "mlflow.db.lock", timeout=60)


def open_store(experiment: str) -> tuple["MlflowClient", str]:
    """A client of the store and the experiment's id, creating either where missing.

    Raises NoAnswerError if the store does not answer, and UserError if it refuses or the experiment is deleted.
    """
    uri = tracking_uri()
    try:
        from mlflow import MlflowClient
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # an absent PostgreSQL would be asked for 100 s
        with store_lock():
            _create_sqlite(uri)
            client = MlflowClient(uri)
            existing = client.get_experiment_by_name(experiment) or _create_experiment(client, experiment, uri)
    except Exception as error:
        kind = NoAnswerError if is_no_answer(error) else UserError
        raise kind(masked(f"MLflow store {uri}: {error}. Set MLFLOW_TRACKING_URI to a store that answers")) from error
    if existing.lifecycle_stage == "deleted":
        restore = f"restore it (mlflow experiments restore -x {existing.experiment_id})"
        raise UserError(f"MLflow experiment {experiment!r} is deleted: {restore} or change tracking.experiment")
    return client, existing.experiment_id


def _create_sqlite(uri: str) -> None:
    """Create a SQLite store, atomically: one whose migrations were killed, or ran twice at once, cannot be opened again."""
    from sqlalchemy import make_url

    path = uri.startswith("sqlite:") and make_url(uri).database
    if path and not (Path(path).exists() and Path(path).stat().st_size):  # empty: SQLite's, after a store was deleted
        from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "mlflow.db"
            SqlAlchemyStore(f"sqlite:///{new}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
            write_atomic(Path(path), new.read_bytes())


def _create_experiment(client: "MlflowClient", name: str, uri: str) -> "Experiment":
    # A server chooses its own artifact folder; without one, the default would lie in the current folder.
    folder = re.sub(r"[^\w-]", "_", name)
    location = (main_checkout() / "mlartifacts" / folder).as_uri() if uri.startswith("sqlite:") else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # so that the UI opens the right pages
    try:
        return client.get_experiment(client.create_experiment(name, location, kind))
    except Exception:
        if existing := client.get_experiment_by_name(name):  # another machine was faster, or the answer was lost
            return existing
        raise


def is_no_answer(error: Exception) -> bool:
    """Whether the store may do later what it has not done; otherwise it refuses, or the defect is ours."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, MlflowException):
        return (status := error.get_http_status_code()) >= 500 or status in TEMPORARY
    return isinstance(error, SQLAlchemyError | OSError)  # an error of requests is an OSError
