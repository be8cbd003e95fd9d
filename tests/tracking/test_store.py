import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.core.errors import UserError
from pipeline.core.tracking_uri import masked
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import open_store


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_creates_the_store_leaves_none(store: Path):
    code = """
import os, signal
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *_):
    if "ADD COLUMN client_request_id" in statement:  # one of MLflow's migrations, which SQLite does not undo
        os.kill(os.getpid(), signal.SIGKILL)

from pipeline.tracking.store import open_store
open_store("e")
"""
    (store / "mlflow.db").unlink()
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (store / "mlflow.db").exists()
    (store / "mlflow.db").touch()  # as SQLite leaves it where a store was deleted under a process
    assert open_store("e")[1] == open_store("e")[1]


def test_a_relative_sqlite_path_is_in_the_main_checkout(store: Path, monkeypatch: pytest.MonkeyPatch):
    (store / "mlflow.db").rename(store / "elsewhere.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    open_store("e")
    assert MlflowClient(f"sqlite:///{store}/elsewhere.db").get_experiment_by_name("e")


def test_a_store_that_cannot_be_used_is_a_user_error(store: Path):
    (store / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db"):
        open_store("e")


def test_a_deleted_experiment_is_a_user_error_whatever_may_come_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACK_LATER", "1")
    client, identifier = open_store("e")
    client.delete_experiment(identifier)
    with pytest.raises(UserError, match="'e' is deleted"):
        Mirror("e")


@pytest.mark.parametrize(
    "uri",
    [
        "http://someone:hunter2@127.0.0.1:9",
        "http://someone:hun@ter2%2F@127.0.0.1:9",
        "http://hunter2@127.0.0.1:9",
        "postgresql://someone:hunter2@127.0.0.1:9/runs",
        "postgresql://127.0.0.1:9/runs?user=someone&password=hunter2",
        "nonsense://someone:hunter2@somewhere",
        "http://someone:hunter2@[::1",
    ],
)
def test_credentials_in_the_stores_address_are_never_printed(
    uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        Mirror("e")
    assert time.monotonic() < start + 10
    monkeypatch.setenv("TRACK_LATER", "1")
    with contextlib.suppress(UserError):
        Mirror("e")
    shown = f"{raised.value}{''.join(capfd.readouterr())}"
    assert not any(secret in shown for secret in ("hunter2", "hun", "ter2", "/@"))
    assert "MLflow store " in shown


def test_credentials_in_an_error_are_masked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://someone:hunter%202@runs.example")
    text = "no route to https://someone:hunter%202@runs.example/api (someone, 'hunter 2'), s3://key:abc@bucket, token=xyz&x=1"
    assert masked(text) == ("no route to https://***@runs.example/api (someone, '***'), s3://***@bucket, token=***&x=1")
