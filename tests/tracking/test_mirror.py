import multiprocessing
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from pipeline.core.errors import UserError
from pipeline.core.files import read_yaml
from pipeline.core.tracking_uri import tracking_uri
from pipeline.tracking import mirror as module
from pipeline.tracking.mirror import Mirror
from tests.tracking.samples import DATASET, STUDENTS, curve, make_evaluation, make_record, runs

CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "train_hard", "system/cpu_utilization_percentage")


class Client:
    """A store's client of which some calls fail: `before` and `after` they are done, by name."""

    def __init__(self, client: MlflowClient, before: Callable[[str], None], after: Callable[[str], None] = lambda _: None):
        self.client, self.before, self.after = client, before, after
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            self.before(name)
            answer = getattr(self.client, name)(*arguments, **named)
            self.after(name)
            return answer

        return call


def no_answer(_: str) -> None:
    raise MlflowException("somebody tripped over a cable", TEMPORARILY_UNAVAILABLE)


def kill(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def steps(name: str, metric: str = "val_loss") -> list[int]:
    """The steps of a metric's points in the run of that name."""
    return [step for step, _ in curve(runs()[name], metric)]


@pytest.fixture
def silent(capfd: pytest.CaptureFixture):
    """Fails if something was said: where nothing goes wrong, nothing is."""
    yield
    assert "tracking:" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("silent")
def test_a_training_is_one_run_with_its_parameters_curves_data_and_origin_below_its_setting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_STAGE", "train_teacher")
    monkeypatch.setenv("DVC_EXP_NAME", "warm-owl")
    mirror = Mirror("e")
    mirror.training(make_record(1))
    for epochs in range(4):
        mirror.training(make_record(epochs=epochs, finished=False))
        assert runs()["teacher/seed0"].info.status == "RUNNING"
    for _ in range(2):
        mirror.training(make_record())
    run, parent = runs()["teacher/seed0"], runs()["teacher"]
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1_700_000_000_000, 1_700_000_004_500)
    parameters = {"model": "teacher", "dataset": "digits", "distillation.lr": "0.001", "precision": "fp32"}
    assert run.data.params == parameters | {"seed": "0"}
    tags = {"dvc.stage": "train_teacher", "dvc.experiment": "warm-owl", "setting": "teacher-setting", "model": "teacher"}
    tags |= {"training": "teacher-0", "checkpoint_md5": "md5-teacher-0", "mlflow.parentRunId": parent.info.run_id}
    assert tags.items() <= run.data.tags.items()
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert run.data.tags["mlflow.note.content"].startswith("**teacher/seed0**, trained on digits.\n\nAgain: `git checkout ")
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.tags[0].value) == ("digits", "training")
    assert {name: [step for step, _ in curve(run, name)] for name in CURVES} == {name: [1, 2, 3] for name in CURVES}
    assert curve(run, "val_loss") == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3))]
    assert curve(run, "training_seconds") == [(0, 4.5)]
    assert (parent.info.status, parent.data.params) == ("FINISHED", parameters)
    assert parent.info.end_time == runs()["teacher/seed1"].info.end_time, "the last of its seeds'"
    assert runs()["teacher/seed1"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert len(runs()) == 3


@pytest.mark.usefixtures("silent")
def test_a_training_that_failed_says_so_until_it_is_resumed():
    mirror = Mirror("e")
    mirror.training(make_record(epochs=1, finished=False, failed="the loss is not finite"))
    assert {run.info.status for run in runs().values()} == {"FAILED"}
    mirror.training(make_record(epochs=2, finished=False))
    assert runs()["teacher/seed0"].info.status == "RUNNING"
    Mirror("e").training(make_record(epochs=3))
    assert {run.info.status for run in runs().values()} == {"FINISHED"}
    assert steps("teacher/seed0") == [1, 2, 3]


def test_what_is_in_the_store_already_costs_one_search():
    mirror = Mirror("e")
    mirror.training(make_record())
    mirror.client = Client(mirror.client, lambda _: None)
    mirror.training(make_record())
    assert mirror.client.calls == ["search_runs"]


def test_two_settings_at_once_are_named_and_repeated_by_their_own_parameters(store: Path, monkeypatch: pytest.MonkeyPatch):
    """Not by params.yaml as it is now: DVC has changed it for the next experiment by the time that the first is mirrored."""
    monkeypatch.setenv("DVC_STAGE", "distill_student")
    monkeypatch.setattr(module, "commit", lambda: "c" * 40)
    monkeypatch.setattr(module, "code_is_committed", lambda: True)
    mirror = Mirror("e")
    for temperature, alpha in ((6, 0.7), (8.0, 0.25), (5, 0.7)):
        parameters = {"kd.temperature": temperature, "kd.alpha": alpha, "distillation.lr": 0.001, "not.there": 1}
        name = f"{temperature}-{alpha}".replace(".", "_")
        mirror.training(make_record(3, model="student", parameters=parameters, digest=name, setting=name))
    repeat = {name: run.data.tags["repeat"] for name, run in runs().items()}
    again = "Again: `git checkout cccccccccccc && dvc {} distill_student`".format
    assert repeat == {
        "student": again("repro"),
        "student/seed3": again("exp run --temp -S 'seeds=[3]'"),
        "student T=6": again("exp run --temp -S kd.temperature=6"),
        "student T=6/seed3": again("exp run --temp -S kd.temperature=6 -S 'seeds=[3]'"),
        "student T=8 alpha=0.25": again("exp run --temp -S kd.temperature=8 -S kd.alpha=0.25"),
        "student T=8 alpha=0.25/seed3": again("exp run --temp -S kd.temperature=8 -S kd.alpha=0.25 -S 'seeds=[3]'"),
    }


@pytest.mark.parametrize("value", [1e-5, 1e-7, 12.5, 1e22, 3, True, "1.0", 'own data/it\'s "ä".npz', [0, 7], None])
def test_the_command_to_repeat_brings_a_value_back_as_it_was(value: object, committed: dict, tmp_path: Path):
    committed["block.key"] = "something else"
    Mirror("e").training(make_record(parameters={"block.key": value}))
    (run,) = (run for name, run in runs().items() if name.endswith("/seed0"))
    words = shlex.split(run.data.tags["repeat"].split("`")[1])
    params = tmp_path / "params.yaml"
    params.write_text("block:\n  key: something else\n")
    apply_overrides(params, words[words.index("-S") + 1 :][:1])  # as dvc exp run -S does
    assert read_yaml(params) == {"block": {"key": value}}
    assert isinstance(read_yaml(params)["block"]["key"], type(value))


def test_a_store_that_often_refuses_or_loses_the_answer_ends_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PAUSE", 0)
    chance = random.Random(0)

    def unreliable(name: str) -> None:
        if chance.random() < 0.15:
            no_answer(name)

    mirror, records = Mirror("e"), [make_record(0), make_record(1)]
    mirror.client = Client(mirror.client, unreliable, unreliable)
    for epochs in range(4):
        for seed in (0, 1):
            mirror.training(make_record(seed, epochs, finished=False))
    mirror.evaluation(make_evaluation(*records))
    calls = 0
    while mirror.pending:
        mirror.training(records[calls % 2])
        calls += 1
        assert calls < 500
    by_name = runs()
    assert set(by_name) == {f"{model}{seed}" for model in ("teacher", *STUDENTS) for seed in ("", "/seed0", "/seed1")}
    for name, run in by_name.items():
        assert run.info.status == "FINISHED"
        assert len(run.inputs.dataset_inputs) in (1, 2)
        once = [key for key in run.data.metrics if key.startswith("test_") or key in ("best_epoch", "training_seconds")]
        assert {key: len(curve(run, key)) for key in once} == dict.fromkeys(once, 1)
        if "seed" in name:
            keys = CURVES if "teacher" in name else CURVES[:-1]
            assert {key: [step for step, _ in curve(run, key)] for key in keys} == {key: [1, 2, 3] for key in keys}
            assert run.data.tags["mlflow.parentRunId"] == by_name[name.split("/")[0]].info.run_id


def test_a_kill_between_the_points_and_what_follows_doubles_nothing(monkeypatch: pytest.MonkeyPatch):
    """MLflow writes the points of a batch first, then its tags."""
    Mirror("e").training(make_record(epochs=1, finished=False))
    for name in ("_set_tags", "update_run_info"):
        with monkeypatch.context() as patch:
            patch.setattr(SqlAlchemyStore, name, kill)
            with pytest.raises(KeyboardInterrupt):
                Mirror("e").training(make_record())
            assert steps("teacher/seed0", "training_seconds") == [0]
    Mirror("e").training(make_record())
    run = runs()["teacher/seed0"]
    assert (run.info.status, run.data.tags["checkpoint_md5"]) == ("FINISHED", "md5-teacher-0")
    assert (steps("teacher/seed0"), steps("teacher/seed0", "training_seconds")) == ([1, 2, 3], [0])


def test_a_store_that_goes_away_is_said_once_asked_again_after_a_while_and_completed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    mirror = Mirror("e")
    mirror.training(make_record(epochs=1, finished=False))
    client, mirror.client = mirror.client, Client(mirror.client, no_answer)
    for epochs in (2, 3):
        mirror.training(make_record(epochs=epochs, finished=False))
    mirror.training(make_record())
    mirror.training(make_record(seed=1))
    assert len(mirror.client.calls) == 1
    clock[0] += module.PAUSE + 1
    mirror.training(make_record(seed=1))
    assert len(mirror.client.calls) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search("cable.*make sync", line)
    mirror.client = client
    mirror.evaluation(make_evaluation(make_record(0), make_record(1)))
    assert len(runs()) == 2
    clock[0] += module.PAUSE + 1
    mirror.training(make_record(seed=2))
    assert len(runs()) == 10
    assert steps("teacher/seed0") == [1, 2, 3]
    assert {run.info.status for run in runs().values()} == {"FINISHED"}


def test_a_store_that_does_not_answer_at_the_start_is_an_error_unless_it_may_come_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(UserError, match="TRACK_LATER=1"):
            Mirror("e")
        patch.setenv("TRACK_LATER", "1")
        mirror = Mirror("e")
        mirror.training(make_record())
        assert capfd.readouterr().err.count("make sync") == 1
    monkeypatch.setattr(module, "PAUSE", 0)
    mirror.training(make_record(1))  # the store is back
    assert set(runs()) == {"teacher", "teacher/seed0", "teacher/seed1"}


def test_what_the_store_refuses_is_said_once_costs_nothing_else_and_is_tried_again(capfd: pytest.CaptureFixture):
    def refuse(name: str) -> None:
        if name == "log_inputs":
            raise MlflowException("no such\nthing", INVALID_PARAMETER_VALUE)

    mirror = Mirror("e")
    mirror.client = Client(mirror.client, refuse)
    for seed in (0, 1):
        mirror.training(make_record(seed))
    assert capfd.readouterr().err.count("\n") == 1
    assert len(mirror.refusals) == 1
    assert not mirror.pending
    assert {run.info.status for run in runs().values()} == {"FINISHED"}
    assert len(curve(runs()["teacher/seed1"], "val_loss")) == 3
    Mirror("e").training(make_record(1))
    assert [len(runs()[name].inputs.dataset_inputs) for name in ("teacher/seed0", "teacher/seed1")] == [0, 1]


def test_names_values_and_numbers_that_mlflow_has_limits_for(monkeypatch: pytest.MonkeyPatch):
    """It sends a thousand points at a time: a batch that was sent in part is completed."""
    log_batch, full = SqlAlchemyStore.log_batch, []

    def second_fails(store: SqlAlchemyStore, run_id: str, metrics: list, params: list, tags: list) -> None:
        if len(metrics) == 1000:
            full.append(metrics)
            if len(full) == 2:
                no_answer("")
        log_batch(store, run_id, metrics, params, tags)

    history = [make_record(epochs=1).history[0].model_copy(update={"terms": {"odd (name)": 0.5}})] * 400
    parameters = {f"block.key{number}": "x" * 7000 for number in range(150)}
    record = make_record(epochs=400, history=history, parameters=parameters)
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(SqlAlchemyStore, "log_batch", second_fails)
    mirror = Mirror("e")
    mirror.training(record)
    assert 0 < len(steps("teacher/seed0")) < 400
    mirror.training(record)
    assert steps("teacher/seed0") == steps("teacher/seed0", "train_odd _name_") == [*range(1, 401)]
    assert len(runs()["teacher/seed0"].data.params["block.key149"]) == 6000


def mirror_all(_: int) -> None:
    module.committed_parameters = lambda _: {}
    mirror = Mirror("e")
    for seed in range(3):
        mirror.training(make_record(seed))


@pytest.mark.slow
def test_processes_that_mirror_the_same_trainings_into_a_store_that_does_not_exist_make_one_run_of_each(
    store: Path, capfd: pytest.CaptureFixture
):
    (store / "mlflow.db").unlink()
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(mirror_all, range(3), chunksize=1)
    assert len(runs()) == 4
    assert {len(curve(run, "val_loss")) for name, run in runs().items() if "seed" in name} == {3}
    assert "tracking:" not in capfd.readouterr().err


@pytest.mark.usefixtures("silent")
def test_test_results_go_to_each_checkpoints_run_their_means_to_the_parent(store: Path, monkeypatch: pytest.MonkeyPatch):
    evaluation = make_evaluation(*(make_record(seed) for seed in range(3)))
    for seed in range(3):
        Mirror("e").training(make_record(seed, model="student_alone"))
    monkeypatch.setenv("DVC_STAGE", "evaluate@distillation")
    for _ in range(2):
        Mirror("e").evaluation(evaluation)
    unknown = runs()["student_distilled/seed1"]  # until it was evaluated
    assert (unknown.info.status, unknown.data.tags["checkpoint_md5"]) == ("FINISHED", "md5-student_distilled-1")
    assert steps("student_distilled/seed1") == [1, 2, 3]
    assert "dvc.stage" not in unknown.data.tags  # not the one that evaluates
    run, parent, first = (runs()[name] for name in ("student_alone/seed1", "student_alone", "student_distilled"))
    figures = evaluation.detail["models"]["student_alone"]["figures"][1]
    assert {f"test_{name}": value for name, value in figures.items()}.items() <= run.data.metrics.items()
    assert run.data.metrics["test_accuracy_low"] < figures["accuracy"] < run.data.metrics["test_accuracy_high"]
    assert 0 < run.data.metrics["test_f1.one _a_ b_"] < 1
    assert curve(run, "test_accuracy") == [(0, figures["accuracy"])]
    assert sorted(data.tags[0].value for data in run.inputs.dataset_inputs) == ["test", "training"]
    client = MlflowClient(tracking_uri())
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"classification_report.txt", "confusion_matrix.png"}
    assert (store / f"mlartifacts/e/{run.info.run_id}/artifacts/confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert parent.data.metrics["test_accuracy_sd"] == evaluation.metrics["student_alone"]["accuracy_sd"]
    assert re.fullmatch(r"\d\d\.\d\d \(\d\d\.\d\d to \d\d\.\d\d\)", parent.data.tags["accuracy"])
    assert parent.info.end_time < 1_700_000_010_000  # as its trainings, not as the evaluation
    assert not {"verdict", "test_parameters"} & {*parent.data.tags, *parent.data.metrics}
    assert re.fullmatch(r"\+\S+ \(\S+ to \S+\) over student_alone", first.data.tags["gain"])
    assert first.data.tags["verdict"] in ("better", "undecided")
    assert "**student_alone**" in first.data.tags["mlflow.note.content"]
    assert "Seeds 0, 1, 2.\n\nAgain: " in first.data.tags["mlflow.note.content"]
    table = (store / f"mlartifacts/e/{first.info.run_id}/artifacts/results.md").read_text()
    assert "student_alone" in table
    assert not client.list_artifacts(parent.info.run_id)


@pytest.mark.parametrize("later", [60, -1e8], ids=["a minute", "before, by a clock that was set back"])
def test_changed_results_replace_the_old_ones(monkeypatch: pytest.MonkeyPatch, later: float):
    for share, now in ((0.9, 1_800_000_000), (0.7, 1_800_000_000 + later)):
        monkeypatch.setattr(module.time, "time", lambda now=now: now)
        evaluation = make_evaluation(make_record(0), make_record(1), shares=STUDENTS | {"student_distilled": share})
        Mirror("e").evaluation(evaluation)
    figures = evaluation.detail["models"]["student_distilled"]["figures"][0]
    assert {name: runs()["student_distilled/seed0"].data.metrics[f"test_{name}"] for name in figures} == figures
    accuracy = runs()["student_distilled"].data.metrics["test_accuracy"]
    assert accuracy == evaluation.metrics["student_distilled"]["accuracy"]
    assert steps("student_distilled/seed0", "test_accuracy") == [0, 0]
    monkeypatch.setattr("pipeline.reporting.figures.plot_confusion", None)  # nothing is drawn again
    (again := Mirror("e")).evaluation(evaluation)
    assert not again.refusals


def test_a_process_that_trains_does_not_load_mlflow_or_torch_for_the_mirror():
    code = "import sys, pipeline.tracking.mirror; assert not {'mlflow', 'torch', 'numpy', 'pydantic'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_training_that_is_repeated_with_other_values_leaves_one_point_a_step(store: Path):
    """By another process, such as RETRAIN=1's, or on a machine that rounds otherwise."""
    Mirror("e").training(make_record())
    before = runs()["teacher/seed0"].data.metrics
    again = make_record(seconds=99.0)
    again.history[0] = again.history[0].model_copy(update={"train_loss": 123.0})
    Mirror("e").training(again)
    assert runs()["teacher/seed0"].data.metrics == before
    assert (steps("teacher/seed0", "train_loss"), steps("teacher/seed0", "training_seconds")) == ([1, 2, 3], [0])


def test_the_artifacts_of_any_experiment_lie_in_the_checkout(store: Path):
    mirror = Mirror("../../elsewhere/..")
    location = mirror.client.get_experiment(mirror.experiment_id).artifact_location
    assert Path(location.removeprefix("file://")).resolve().parent == store / "mlartifacts"


def test_what_a_data_set_is_called_is_no_markup_in_a_description(store: Path):
    evil = DATASET.model_copy(update={"name": "![x](https:evil.example) <img src=x>.npz"})
    Mirror("e").training(make_record(dataset=evil))
    assert not set("<>[") & set(runs()["teacher/seed0"].data.tags["mlflow.note.content"].split("Again:")[0])
