"""A store that does not answer costs nothing: what it misses is kept, and sent in order, once."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.checkpoints import Epoch
from pipeline.data.prepared import TrainingData
from pipeline.errors import UserError
from pipeline.tracking import Tracker
from pipeline.tracking_store import NoAnswerError, RefusedError, Store, tracking_uri
from pipeline.unsent import Kept, folder

EPOCH = Epoch(train_loss=1.0, train_accuracy=0.5, val_loss=2.0, val_accuracy=0.4)


@pytest.fixture(autouse=True)
def main_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def runs() -> list[Run]:
    store = Store("e")
    return store.client.search_runs([store.experiment_id])


def steps(run: Run) -> list[int]:
    return [point.step for point in MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, "val_loss")]


class Outage:
    """While it is on, the store does nothing, or does what it is asked and does not say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = self.does_it = False
        real = Store.do

        def do(store: Store, operation: str, arguments: dict) -> None:
            if not self.on or self.does_it:
                real(store, operation, arguments)
            if self.on:
                raise NoAnswerError("connection refused")

        monkeypatch.setattr(Store, "do", do)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    return Outage(monkeypatch)


def train(data: TrainingData, outage: Outage, *on: int, epochs: int = 5) -> None:
    """A training during some of whose epochs (0: from the start; `epochs` + 1: at the end) there is an outage."""
    outage.on = 0 in on
    with Tracker("e").training("teacher", 3, data.dataset, {"lr": 0.1}, {"device": "cpu"}) as run:
        for number in range(1, epochs + 1):
            outage.on = number in on
            run.log_epoch(number, EPOCH)
        outage.on = epochs + 1 in on
        run.log_checkpoint("abc", 3, 1.5)
    outage.on = False


@pytest.mark.parametrize("does_it", [False, True], ids=["nothing is done", "the answer is lost"])
@pytest.mark.parametrize("on", [(0,), (2,), (3, 4), (6,), range(7)], ids=str)
def test_after_an_outage_every_point_is_there_once(
    data: TrainingData, outage: Outage, on: tuple[int, ...], does_it: bool, capsys: pytest.CaptureFixture
):
    outage.does_it = does_it
    train(data, outage, *on)
    assert capsys.readouterr().err.count("no answer") == 1
    assert list(folder().glob("*.jsonl")), "the pause is not over, so the rest was kept"
    Tracker("e")
    assert not list(folder().iterdir()) or {path.name for path in folder().iterdir()} == {"sending"}
    (run,) = runs()
    assert steps(run) == [1, 2, 3, 4, 5]
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert run.data.tags["checkpoint_md5"] == "abc"
    assert len(MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, "training_seconds")) == 1


def test_a_store_that_answers_again_is_used_again_in_the_same_stage(
    data: TrainingData, outage: Outage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.tracking.PAUSE", 0)
    train(data, outage, 2, 3)
    assert not list(folder().glob("*.jsonl"))
    assert steps(runs()[0]) == [1, 2, 3, 4, 5]


def test_sending_that_is_cut_short_goes_on_where_it_was(data: TrainingData, outage: Outage, monkeypatch):
    train(data, outage, 1)
    (path,) = folder().glob("*.jsonl")
    before = path.read_text().splitlines()
    done = []
    real = Store.do

    def twice(store: Store, operation: str, arguments: dict) -> None:
        if len(done) == 2:
            raise NoAnswerError("again")
        done.append(operation)
        real(store, operation, arguments)

    monkeypatch.setattr(Store, "do", twice)
    with pytest.raises(UserError, match="again"):
        Tracker("e")
    assert path.read_text().splitlines() == [before[0], *before[3:]]
    monkeypatch.setattr(Store, "do", real)
    Tracker("e")
    assert steps(runs()[0]) == [1, 2, 3, 4, 5]


def test_a_line_torn_by_a_kill_is_left_out_and_an_empty_file_removed(data: TrainingData, outage: Outage):
    train(data, outage, 3)
    (path,) = folder().glob("*.jsonl")
    path.write_text(path.read_text()[:-5])
    (folder() / "1-1.jsonl").touch()
    Tracker("e")
    assert not list(folder().glob("*.jsonl"))
    assert steps(runs()[0]) == [1, 2, 3, 4, 5]
    assert runs()[0].info.status == "RUNNING", "the torn line was the end of the run"


def test_what_a_living_process_keeps_and_what_is_for_another_store_is_left_alone(main_checkout: Path):
    mine, other = Kept(tracking_uri(), "e"), Kept("sqlite:////elsewhere.db", "e")
    for kept in (mine, other):
        kept.add("finish", {})
    del other
    Tracker("e")
    assert len(list(folder().glob("*.jsonl"))) == 2


def test_what_the_store_refuses_is_set_aside_and_ends_nothing(data: TrainingData, monkeypatch, capsys):
    real = Store.do

    def do(store: Store, operation: str, arguments: dict) -> None:
        if arguments.get("step") == 2:
            raise RefusedError("not like this")
        real(store, operation, arguments)

    monkeypatch.setattr(Store, "do", do)
    with Tracker("e").training("teacher", 3, data.dataset, {}, {"device": "cpu"}) as run:
        for number in range(1, 6):
            run.log_epoch(number, EPOCH)
    assert steps(runs()[0]) == [1, 3, 4, 5]
    assert "not like this" in (folder() / "refused").read_text()
    assert "refused" in capsys.readouterr().err


def test_a_run_deleted_while_it_is_trained_ends_nothing(data: TrainingData, capsys):
    with Tracker("e").training("teacher", 3, data.dataset, {}, {"device": "cpu"}) as run:
        run.log_epoch(1, EPOCH)
        Store("e").client.delete_run(runs()[0].info.run_id)
        run.log_epoch(2, EPOCH)
    assert "was refused" in capsys.readouterr().err


def test_a_second_run_from_a_lost_answer_is_removed(data: TrainingData):
    with Tracker("e").training("teacher", 3, data.dataset, {}, {"device": "cpu"}) as run:
        store = Store("e")
        store.client.create_run(store.experiment_id, tags={"key": run.key})  # a slow server did it in the end
        run.log_epoch(1, EPOCH)
    assert [steps(run) for run in runs()] == [[1]]


def test_without_an_answer_at_the_start_nothing_begins_unless_asked_to(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="TRACK_LATER=1"):
        Tracker("e")
    monkeypatch.setenv("TRACK_LATER", "1")
    tracker = Tracker("e")
    with tracker.training("teacher", 3, data.dataset, {}, {"device": "cpu"}) as run:
        run.log_epoch(1, EPOCH)
    assert tracker.training_seconds("abc") is None
    assert capsys.readouterr().err.count("no answer") == 1
    assert len(list(folder().glob("*.jsonl"))) == 1
