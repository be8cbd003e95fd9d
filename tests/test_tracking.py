import multiprocessing
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from pipeline.networks.description import Description, Epoch
from pipeline.data.prepared import TrainingData
from pipeline.core.errors import UserError
from pipeline.tracking.mirror import Tracker
from pipeline.tracking.store import Store, tracking_uri

HISTORY = [
    Epoch(train_loss=1.0 / n, train_accuracy=1 - 0.5 / n, val_loss=2.0 / n, val_accuracy=1 - 0.6 / n) for n in (1, 2, 3)
]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def described(data: TrainingData) -> Description:
    return Description(
        format=2,
        model="teacher",
        architecture="compact_cnn",
        arguments={"width": 8, "hidden": 32},
        dataset=data.dataset,
        seed=3,
        parameters={"teacher.width": 8},
        history=HISTORY,
        best_epoch=3,
        chance=0.1,
    )


def runs(experiment: str = "e") -> list[Run]:
    client = MlflowClient(tracking_uri())
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def log_training(described: Description, md5: str = "abc") -> None:
    with Tracker("e").training("teacher", 3, described.dataset, described.parameters, {"device": "cpu"}) as run:
        for number, epoch in enumerate(described.history, start=1):
            run.log_epoch(number, epoch)
        run.log_checkpoint(md5, 3, seconds=1.5)


def log_test(described: Description, accuracy: float = 0.9, md5: str = "abc") -> None:
    Tracker("e").log_test(
        md5,
        described,
        {"test_accuracy": accuracy, "test_f1/a (b, c)": 0.5},
        {"report.txt": "text"},
        {"f.png": Figure},
    )


def test_a_training_is_one_run_with_its_parameters_curves_and_origin(described: Description, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train_teacher")
    monkeypatch.setenv("DVC_EXP_NAME", "warm-owl")
    log_training(described)
    (run,) = runs()
    assert run.info.run_name == "teacher/seed3"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model": "teacher", "seed": "3", "dataset": "digits", "teacher.width": "8"}
    assert run.data.tags["dvc.stage"] == "train_teacher"
    assert run.data.tags["dvc.experiment"] == "warm-owl"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    note = run.data.tags["mlflow.note.content"]
    assert "**teacher**, trained on digits with seed 3" in note
    assert "train_teacher`" in note
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert run.data.tags["checkpoint_md5"] == "abc"
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    curve = MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_training_that_ends_badly_says_so(described: Description, error: type[BaseException], status: str):
    with pytest.raises(error), Tracker("e").training("teacher", 3, described.dataset, {}, {"device": "cpu"}):
        raise error
    assert [run.info.status for run in runs()] == [status]


def test_a_kill_between_a_checkpoints_points_and_its_tag_doubles_nothing(described: Description, monkeypatch):
    """MLflow writes the points of a batch first, then its tags."""
    with Tracker("e").training("teacher", 3, described.dataset, {}, {}, "k") as run, monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "_set_tags", lambda *_: None)
        run.log_checkpoint("abc", 2, seconds=1.5)
    assert "checkpoint_md5" not in runs()[0].data.tags
    with Tracker("e").training("teacher", 3, described.dataset, {}, {}, "k") as run:
        run.log_checkpoint("abc", 2, seconds=1.6)
    (run,) = runs()
    assert run.data.tags["checkpoint_md5"] == "abc"
    history = MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, "training_seconds")
    assert [point.value for point in history] == [1.5]


def test_test_results_go_to_the_run_that_made_the_checkpoint_once(described: Description, store: Path):
    log_training(described, "other")
    log_training(described)
    for _ in range(2):
        log_test(described)
    by_checkpoint = {run.data.tags["checkpoint_md5"]: run for run in runs()}
    assert len(runs()) == 2
    assert "test_accuracy" not in by_checkpoint["other"].data.metrics
    found = by_checkpoint["abc"]
    assert found.data.metrics["test_accuracy"] == 0.9
    assert found.data.metrics["test_f1/a _b_ c_"] == 0.5
    client = MlflowClient(tracking_uri())
    assert len(client.get_metric_history(found.info.run_id, "test_accuracy")) == 1
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"report.txt", "f.png"}
    assert (store / "mlartifacts" / "e" / found.info.run_id / "artifacts" / "report.txt").read_text() == "text"


def test_a_figure_that_the_run_already_has_is_not_drawn_again(described: Description):
    drawn = []

    def draw() -> Figure:
        drawn.append("f.png")
        return Figure()

    for _ in range(2):
        Tracker("e").log_test("abc", described, {"test_accuracy": 0.9}, {}, {"f.png": draw})
    assert drawn == ["f.png"]


def test_changed_test_results_replace_the_old_ones(described: Description):
    log_training(described)
    log_test(described, 0.9)
    log_test(described, 0.8)
    (run,) = runs()
    assert run.data.metrics["test_accuracy"] == 0.8


def test_a_checkpoint_that_the_store_does_not_know_gets_its_run_made_again_once(described: Description):
    for _ in range(2):
        log_test(described)
    (run,) = runs()
    assert run.info.run_name == "teacher/seed3"
    assert run.data.tags["recreated"] == "true"
    assert run.data.metrics["test_accuracy"] == 0.9
    assert run.data.metrics["train_loss"] == pytest.approx(1 / 3)


def test_a_checkpoints_runs_are_told_in_a_line_each(described: Description):
    log_training(described)
    log_training(described, md5="other")
    log_test(described)
    (line,) = Store("e").describe_runs("abc")
    assert line.startswith("teacher/seed3, run ")
    assert "finished" in line
    assert line.endswith("test accuracy 0.9000")
    log_test(described, md5="unknown")
    (line,) = Store("e").describe_runs("unknown")
    assert line.endswith("recreated by evaluate, not trained here")
    assert Store("e").describe_runs("nothing") == []


def test_a_summary_is_written_once_for_the_same_results():
    for accuracy in (0.9, 0.9, 0.8):
        Tracker("e").log_summary(
            "baselines", {}, {"accuracy": accuracy}, "It helps.", {"results.md": f"{accuracy}"}, []
        )
    assert [run.info.run_name for run in runs()] == ["baselines/summary"] * 2
    assert runs()[0].data.tags["mlflow.note.content"].startswith("It helps.")


def open_store(number: int) -> str:
    return Store("e").experiment_id


def test_four_processes_may_open_a_store_that_does_not_exist_yet(store: Path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(open_store, range(4), chunksize=1))) == 1
    with sqlite3.connect(store / "mlflow.db") as database:
        assert database.execute("select count(*) from experiments where name = 'e'").fetchone() == (1,)


def test_a_relative_sqlite_path_is_in_the_main_checkout(store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    Tracker("e")
    assert (store / "elsewhere.db").is_file()


def test_a_store_that_refuses_is_a_user_error(store: Path, monkeypatch: pytest.MonkeyPatch):
    (store / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"mlflow\.db"):
        Tracker("e")


def test_a_deleted_experiment_is_a_user_error():
    Store("e").client.delete_experiment(Store("e").experiment_id)
    with pytest.raises(UserError, match="'e' is deleted"):
        Tracker("e")


def test_a_process_that_is_killed_while_it_creates_the_store_leaves_none(store: Path):
    code = """
import os, signal
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *_):
    if "ADD COLUMN client_request_id" in statement:  # one of MLflow's migrations, which SQLite does not undo
        os.kill(os.getpid(), signal.SIGKILL)

from pipeline.tracking.store import Store
Store("e")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (store / "mlflow.db").exists()
    Store("e")
    assert runs() == []
