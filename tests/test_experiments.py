"""What a user does after the first run: forced repetition, seeds, experiments, the queue. The tests go from top to bottom."""

import re
from collections import Counter

import numpy as np
import pytest

from tests.checkout import Checkout
from tests.conftest import small_checkout, stages_run, write_npz

pytestmark = pytest.mark.slow
EVALUATION = "evaluate@distillation"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with the results of one track, committed."""
    checkout = small_checkout(tmp_path_factory.mktemp("experiments") / "checkout")
    checkout.dvc("repro", EVALUATION)
    checkout.run("git", "add", "-A")
    checkout.run("git", "commit", "-qm", "results")
    return checkout


def test_forced_repetition_gives_the_same_bytes_and_doubles_no_run(checkout: Checkout):
    lock, runs = (checkout.folder / "dvc.lock").read_bytes(), checkout.by_name()
    assert checkout.dvc("repro", "--force", "--single-item", "train_teacher").count("taken from .trainings/") == 2
    checkout.environment["RETRAIN"] = "1"
    output = checkout.dvc("repro", "--force", EVALUATION)
    del checkout.environment["RETRAIN"]
    assert len(stages_run(output)) == 5
    assert "taken from .trainings/" not in output
    assert (checkout.folder / "dvc.lock").read_bytes() == lock
    assert checkout.by_name() == runs


def test_an_added_seed_trains_alone_and_goes_again(checkout: Checkout):
    teachers = checkout.folder / "models/distillation/teacher"
    before = {path.name: path.read_bytes() for path in teachers.iterdir()}
    checkout.set(seeds=[0, 1, 2])
    assert checkout.dvc("repro", "train_teacher").count("taken from .trainings/") == 2
    assert before.items() <= {path.name: path.read_bytes() for path in teachers.iterdir()}.items()
    checkout.set(seeds=[0, 1])
    assert "is cached - skipping run" in checkout.dvc("repro", "train_teacher")
    assert before == {path.name: path.read_bytes() for path in teachers.iterdir()}


def test_another_temperature_trains_the_distilled_student_alone_and_its_run_says_how_to_repeat_it(checkout: Checkout):
    before, warmer = checkout.by_name(), "student_distilled T=6"
    output = checkout.dvc("exp", "run", "--name", "warmer", "-S", "kd.temperature=6", EVALUATION)
    assert stages_run(output) == ["distill_student@distillation", EVALUATION]
    assert checkout.by_name() - before == Counter({warmer: 1, f"{warmer}/seed0": 1, f"{warmer}/seed1": 1})
    runs = {run.info.run_name: run for run in checkout.mlflow_runs()}
    assert "dvc.experiment" not in runs["student_distilled"].data.tags
    for name in (warmer, f"{warmer}/seed0"):
        assert "dvc exp run --temp -S kd.temperature=6" in runs[name].data.tags["mlflow.note.content"]
        assert runs[name].data.tags["dvc.experiment"] == "warmer"
        assert runs[name].data.params["kd.temperature"] == "6.0"
    assert "over student_alone" in runs[warmer].data.tags["gain"]
    assert "student_distilled" in checkout.dvc("metrics", "diff", "--all")


def test_two_experiments_at_once_fill_a_store_that_did_not_exist(checkout: Checkout):
    temperatures = (2, 3)
    for temperature in temperatures:
        checkout.dvc("exp", "run", "--queue", "--name", f"t{temperature}", "-S", f"kd.temperature={temperature}", EVALUATION)
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///fresh.db"
    checkout.dvc("queue", "start", "-j", "2")
    del checkout.environment["MLFLOW_TRACKING_URI"]
    states = checkout.queued()
    assert states == {"t2": "Success", "t3": "Success"}, checkout.dvc("queue", "logs", "t2", expect=None)
    runs = checkout.mlflow_runs(f"sqlite:///{checkout.folder}/fresh.db")
    names = ["teacher", "student_alone", *(f"student_distilled T={temperature}" for temperature in temperatures)]
    expected = {name + child: 1 for name in names for child in ("", "/seed0", "/seed1")}
    assert Counter(run.info.run_name for run in runs) == expected
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("test_accuracy" in run.data.metrics for run in runs)
    assert {"t2", "t3"} <= {run.data.tags.get("dvc.experiment") for run in runs}
    assert {"t2", "t3"} <= set(re.split("[,\n]", checkout.dvc("exp", "show", "--csv")))


@pytest.mark.parametrize("setting", ["+kd.temprature=6", "kd.alpha=2"])
def test_a_bad_parameter_stops_an_experiment_with_one_line(checkout: Checkout, setting: str):
    before = checkout.by_name()
    done = checkout.run("dvc", "exp", "run", "--temp", "-S", setting, expect=None)
    assert done.returncode != 0
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert setting.strip("+").split("=")[0] in error
    assert "Traceback" not in done.stdout + done.stderr
    assert checkout.by_name() == before


def test_a_misspelt_setting_is_stopped_by_dvc_itself(checkout: Checkout):
    assert "temprature" in checkout.dvc("exp", "run", "--temp", "-S", "kd.temprature=6", expect=255)


def test_changed_content_behind_an_unchanged_path_is_noticed(checkout: Checkout):
    assert stages_run(checkout.dvc("repro", EVALUATION)) == []
    images = np.load(checkout.folder / "images.npz")["test_images"]
    write_npz(checkout.folder / "images.npz", test_images=255 - images)
    stages = stages_run(checkout.dvc("repro", EVALUATION))
    assert (stages[0], stages[-1]) == ("fetch_data@distillation", EVALUATION)
