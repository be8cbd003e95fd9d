"""A teacher from outside through the whole graph. The tests go from top to bottom."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.files import md5, read_json
from tests.checkout import Checkout
from tests.conftest import small_checkout, stages_run

pytestmark = pytest.mark.slow
REPORT = "report@distillation"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose teacher is a file, ensemble.npz, that two of its own networks have written."""
    checkout = small_checkout(tmp_path_factory.mktemp("outside") / "checkout")
    checkout.dvc("repro", "train_teacher")
    shutil.copytree(checkout.folder / "models/distillation/teacher", checkout.folder / "networks")
    networks = "networks/seed0.safetensors networks/seed1.safetensors"
    checkout.run(*checkout.stage(f"networks.write_logits data/distillation ensemble.npz {networks}"))
    checkout.set(teacher__logits="ensemble.npz")
    checkout.output = checkout.dvc("repro", REPORT)
    return checkout


def reported(checkout: Checkout) -> str:
    """Run the graph up to the evaluation, and the report with the costs as they were; what DVC said."""
    output = checkout.dvc("repro", "evaluate@distillation")
    checkout.run(*checkout.stage("report distillation"))
    return output


def rewrite(checkout: Checkout, name: str = "ensemble.npz", **replaced: np.ndarray | None) -> None:
    arrays = dict(np.load(checkout.folder / name)) | replaced
    np.savez(checkout.folder / name, **{key: array for key, array in arrays.items() if array is not None})


def test_an_ensembles_logits_distil_and_the_report_has_the_teacher(checkout: Checkout):
    assert "train_teacher" in stages_run(checkout.output)
    detail = read_json(checkout.folder / "metrics/detail/distillation.json")
    teacher, student = (detail["models"][model] for model in ("teacher", "student_distilled"))
    assert (teacher["architecture"], teacher["seeds"]) == ("outside: logits", [0, 1])
    assert teacher["parameters"] == {"teacher.logits": "ensemble.npz"}
    assert student["parameters"]["teacher.logits"] == "ensemble.npz"
    logits = np.load(checkout.folder / "ensemble.npz")["test_logits"]
    labels = np.load(checkout.folder / "data/distillation/test/labels.npy")
    assert detail["metrics"]["teacher"]["accuracy"] == (logits.argmax(1) == labels).mean() > 0.5
    assert "`ensemble.npz`" in (checkout.folder / "metrics/report.md").read_text()
    assert "teacher" not in read_json(checkout.folder / "metrics/distillation_costs.json")["models"]
    runs = {run.info.run_name for run in checkout.mlflow_runs()}
    assert "student_distilled logits=ensemble.npz/seed0" in runs
    assert "make sync" not in checkout.output
    checkout.run(*checkout.stage("tracking.sync"))
    assert {run.info.run_name for run in checkout.mlflow_runs()} == runs
    assert stages_run(checkout.dvc("repro", REPORT)) == []


def test_a_changed_file_is_noticed_and_one_without_test_logits_is_not_measured(checkout: Checkout):
    before = md5(checkout.folder / "models/distillation/student_distilled/seed0.safetensors")
    rewrite(checkout, test_logits=None, train_logits=2 * np.load(checkout.folder / "ensemble.npz")["train_logits"])
    assert {"fetch_data@distillation", "train_teacher", "distill_student@distillation"} <= set(stages_run(reported(checkout)))
    assert md5(checkout.folder / "models/distillation/student_distilled/seed0.safetensors") != before
    assert "It was not measured" in (checkout.folder / "metrics/report.md").read_text()
    assert "teacher" not in read_json(checkout.folder / "metrics/distillation.json")


def test_an_experiments_copy_finds_the_file(checkout: Checkout):
    checkout.run("git", "add", "-A")
    checkout.run("git", "commit", "-qm", "a teacher from outside")
    output = checkout.dvc("exp", "run", "--temp", "--name", "warm", "-S", "kd.temperature=6", "evaluate@distillation")
    assert "distill_student@distillation" in stages_run(output)
    compared = checkout.run(*checkout.stage("tracking.compare"), "HEAD", "warm").stdout
    assert re.findall(r"warm against HEAD, (\w+):", compared) == ["student_distilled", "student_alone"]


def test_a_missing_file_is_named_and_null_brings_the_network_back(checkout: Checkout):
    checkout.set(teacher__logits=None, teacher__features="nowhere.npz")
    assert "nowhere.npz: there is no such file" in checkout.dvc("repro", "train_teacher", expect=255)
    checkout.set(teacher__features=None)
    checkout.dvc("repro", "train_teacher")
    assert list(Path(checkout.folder / "data/own/distillation/teacher").iterdir()) == []
    assert sorted(path.suffix for path in (checkout.folder / "models/distillation/teacher").iterdir()) == [".safetensors"] * 2
