"""The real graph, run by the real DVC in a checkout of its own, on small images. The tests of this file go from top to bottom."""

import hashlib
import io
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.export.onnx_model import Student
from tests.conftest import write_npz
from tests.faults.checkout import Checkout
from tests.test_graph import STAGES


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '(.*)'", output)


MODELS = {"simple_cnn", "resnet18", "teacher", "student_distilled", "student_alone"}
TRAININGS = {f"{model}/seed{seed}" for model in MODELS for seed in (0, 1)}


AFTER_DISTILLATION = {
    "evaluate@distillation",
    "export_student",
    "evaluate_export",
    "measure_cost@distillation",
    "report@distillation",
}


def test_repro_runs_every_stage_and_ends_with_the_tables(checkout: Checkout):
    assert sorted(stages_run(checkout.output)) == sorted(STAGES)
    for track in ("baselines", "distillation"):
        assert (checkout.folder / "metrics" / f"{track}.md").read_text().strip() in checkout.output


def test_metrics_hold_means_and_deviations_of_every_model(checkout: Checkout):
    expected = {"baselines": {"simple_cnn", "resnet18"}, "distillation": {"teacher", "student_distilled", "student_alone"}}
    for track, models in expected.items():
        headline = json.loads((checkout.folder / "metrics" / f"{track}.json").read_text())
        detail = json.loads((checkout.folder / "metrics" / "detail" / f"{track}.json").read_text())
        metrics = detail["metrics"]
        assert set(metrics) == models == headline.keys() - {"gain", "gain_low", "gain_high"}
        assert headline["gain_low"] <= headline["gain"] <= headline["gain_high"]
        for model, figures in metrics.items():
            assert headline[model] == {"accuracy": figures["accuracy"]}
            for key in ("accuracy", "auc", "f1_weighted", "final_train_loss"):
                assert figures[key] >= 0
                assert figures[f"{key}_sd"] >= 0
            assert figures["parameters"] > 1000
        assert set(detail["models"]) == models
        for entry in detail["models"].values():
            assert len(entry["by_class"]) == 10
            assert all({"precision", "recall", "f1", "f1_sd"} <= set(figures) for figures in entry["by_class"].values())


def test_every_training_is_a_run_with_curves_and_test_results_of_its_checkpoint(checkout: Checkout):
    runs = {run.info.run_name: run for run in checkout.mlflow_runs()}
    assert set(runs) == TRAININGS | MODELS
    assert len(checkout.mlflow_runs()) == len(runs)
    metrics = json.loads((checkout.folder / "metrics" / "detail" / "distillation.json").read_text())["metrics"]
    accuracies = [runs[f"teacher/seed{seed}"].data.metrics["test_accuracy"] for seed in (0, 1)]
    assert np.mean(accuracies) == pytest.approx(metrics["teacher"]["accuracy"])
    assert runs["teacher"].data.metrics["test_accuracy_ci95"] == metrics["teacher"]["accuracy_ci95"]
    assert runs["teacher/seed1"].data.tags["mlflow.parentRunId"] == runs["teacher"].info.run_id
    assert runs["student_distilled"].data.tags["verdict"] in ("better", "worse", "not distinguishable")
    client = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db")
    for name in TRAININGS:
        assert {"train_loss", "val_loss", "train_accuracy", "val_accuracy", "test_auc"} <= set(runs[name].data.metrics)
        artifacts = {file.path for file in client.list_artifacts(runs[name].info.run_id)}
        assert artifacts == {"classification_report.txt", "confusion_matrix.png"}


def test_a_second_repro_has_nothing_to_do(checkout: Checkout):
    output = checkout.dvc("repro")
    assert stages_run(output) == []
    assert output.count("didn't change, skipping") == len(STAGES)


@pytest.mark.parametrize("retrain", ["", "1"])
def test_forced_repetition_gives_the_same_bytes_and_doubles_no_run(checkout: Checkout, retrain: str):
    lock, runs = (checkout.folder / "dvc.lock").read_bytes(), checkout.by_name()
    checkout.environment |= {"RETRAIN": retrain, "MLFLOW_TRACKING_URI": f"sqlite:///{checkout.folder}/mlflow.db"}
    output = checkout.dvc("repro", "--force", "evaluate@distillation")
    del checkout.environment["RETRAIN"], checkout.environment["MLFLOW_TRACKING_URI"]
    assert len(stages_run(output)) == 5
    assert output.count("taken from .trainings/") == (0 if retrain else 6)
    assert (checkout.folder / "dvc.lock").read_bytes() == lock
    assert checkout.by_name() == runs


def test_a_store_that_is_away_changes_no_byte_and_sync_completes_it(checkout: Checkout):
    lock = (checkout.folder / "dvc.lock").read_bytes()
    checkout.environment |= {"TRACK_LATER": "1", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "RETRAIN": "1"}
    output = checkout.dvc("repro", "--force", "train_student_alone", "evaluate@distillation", "--single-item")
    for name in ("TRACK_LATER", "MLFLOW_TRACKING_URI", "RETRAIN"):
        del checkout.environment[name]
    assert "make sync brings the store up to date" in output
    assert (checkout.folder / "dvc.lock").read_bytes() == lock
    checkout.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{checkout.folder}/synced.db"
    for _ in range(2):
        checkout.run(sys.executable, "-m", "pipeline.tracking.sync")
    runs = {run.info.run_name: run for run in checkout.mlflow_runs(checkout.environment.pop("MLFLOW_TRACKING_URI"))}
    assert set(runs) == TRAININGS | MODELS
    assert all("test_accuracy" in run.data.metrics for run in runs.values())


def stale(checkout: Checkout) -> set[str]:
    return set(json.loads(checkout.run("dvc", "status", "--json").stdout))


TRAINING_STAGES = {stage for stage in STAGES if stage.startswith(("train_", "distill_"))}
EVALUATIONS = {stage for stage in STAGES if stage.startswith(("evaluate@", "report@"))}


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("core", set()),
        ("tracking", set()),
        ("serving", set()),
        ("reporting", {"report@baselines", "report@distillation"}),
        ("evaluation", EVALUATIONS),
        ("training", TRAINING_STAGES | {"measure_cost@baselines", "measure_cost@distillation"}),
        ("networks", {stage for stage in STAGES if not stage.startswith("fetch_data")}),
    ],
)
def test_a_package_is_a_unit_of_staleness(checkout: Checkout, package: str, expected: set[str]):
    path = checkout.folder / "pipeline" / package / "__init__.py"
    before = path.read_text()
    path.write_text(before + "# changed\n")
    try:
        assert stale(checkout) == expected
    finally:
        path.write_text(before)
    assert stale(checkout) == set()


def test_an_added_seed_trains_alone_and_goes_again(checkout: Checkout):
    teachers = checkout.folder / "models/distillation/teacher"
    before = {path.name: path.read_bytes() for path in teachers.iterdir()}
    checkout.set(seeds=[0, 1, 2])
    assert checkout.dvc("repro", "train_teacher").count("taken from .trainings/") == 2
    assert before.items() <= {path.name: path.read_bytes() for path in teachers.iterdir()}.items()
    checkout.set(seeds=[0, 1])
    assert "is cached - skipping run" in checkout.dvc("repro", "train_teacher")
    assert before == {path.name: path.read_bytes() for path in teachers.iterdir()}
    checkout.set(tracking__experiment="another", jobs=1)
    assert stale(checkout) == set()
    checkout.set(tracking__experiment="small-image-distillation", jobs="auto")


def test_another_temperature_trains_the_distilled_student_alone_and_leaves_the_other_models_runs_alone(checkout: Checkout):
    before = checkout.by_name()
    checkout.run("git", "add", "-A")
    checkout.run("git", "commit", "-qm", "results")
    output = checkout.dvc("exp", "run", "--name", "warmer", "-S", "kd.temperature=6")
    assert set(stages_run(output)) == {"distill_student", *AFTER_DISTILLATION}
    warmer = "student_distilled T=6"
    assert checkout.by_name() - before == Counter({warmer: 1, f"{warmer}/seed0": 1, f"{warmer}/seed1": 1})
    temperatures = {
        (run.data.params["kd.temperature"], run.data.tags.get("dvc.experiment"))
        for run in checkout.mlflow_runs()
        if run.info.run_name.startswith("student_distilled")
    }
    assert temperatures == {("5.0", None), ("6.0", "warmer")}
    teachers = [run for run in checkout.mlflow_runs() if run.info.run_name == "teacher/seed0"]
    assert any("test_accuracy" in run.data.metrics for run in teachers)
    assert "student_distilled" in checkout.dvc("metrics", "diff", "--all")


def test_four_experiments_at_once_fill_a_store_that_did_not_exist(checkout: Checkout):
    temperatures = (2, 3, 4, 7)
    for temperature in temperatures:
        setting = ("--name", f"t{temperature}", "-S", f"kd.temperature={temperature}")
        checkout.dvc("exp", "run", "--queue", *setting, "evaluate@distillation")
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///fresh.db"
    checkout.dvc("queue", "start", "-j", "4")
    del checkout.environment["MLFLOW_TRACKING_URI"]
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        status = checkout.dvc("queue", "status")
        if "Queued" not in status and "Running" not in status:
            break
        time.sleep(2)
    assert status.count("Success") == 4, status + checkout.dvc("queue", "logs", "t2", expect=None)
    client = MlflowClient(f"sqlite:///{checkout.folder}/fresh.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = ["teacher", "student_alone", *(f"student_distilled T={temperature}" for temperature in temperatures)]
    assert Counter(run.info.run_name for run in runs) == Counter(
        {name + child: 1 for name in names for child in ("", "/seed0", "/seed1")}
    )
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("test_accuracy" in run.data.metrics for run in runs)
    experiments = {run.data.tags.get("dvc.experiment") for run in runs}
    assert {f"t{temperature}" for temperature in temperatures} <= experiments
    listed = checkout.dvc("exp", "show", "--csv")
    assert "t2" in listed
    assert "t3" in listed


@pytest.mark.parametrize("target", ["models/distillation/teacher/seed0.safetensors", "HEAD", "warmer"])
def test_lineage_goes_from_bytes_to_runs(checkout: Checkout, target: str):
    output = checkout.run(sys.executable, "-m", "pipeline.tracking.lineage", target).stdout
    runs = {run.info.run_id: run for run in checkout.mlflow_runs()}
    checksum, run_id = re.search(
        r"teacher/seed0.safetensors  (\w{32})\n    teacher/seed0, run (\w{32}), finished", output
    ).groups()
    assert runs[run_id].data.tags["checkpoint_md5"] == checksum
    path = checkout.folder / "models/distillation/teacher/seed0.safetensors"
    assert hashlib.md5(path.read_bytes()).hexdigest() == checksum
    if target == "warmer":
        assert "experiment warmer" in output


def test_lineage_of_nothing_is_one_line(checkout: Checkout):
    assert "neither a file nor a git revision" in stage_fails(checkout, "pipeline.tracking.lineage", "no-such-thing")


def test_a_runs_note_says_how_to_repeat_it(checkout: Checkout):
    runs = {run.info.run_name: run for run in checkout.mlflow_runs()}
    for name in ("student_distilled T=6", "student_distilled T=6/seed0"):
        assert "dvc exp run -S kd.temperature=6" in runs[name].data.tags["mlflow.note.content"]
        assert runs[name].data.tags["dvc.experiment"] == "warmer"
    assert runs["student_distilled T=6"].data.params["kd.temperature"] == "6.0"
    assert "points over student_alone" in runs["student_distilled T=6"].data.tags["gain"]


def test_a_folder_of_images_becomes_a_table(checkout: Checkout, tmp_path: Path):
    images = np.load(checkout.folder / "data/distillation/test/images.npy")[:5]
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{number}.png")
    output = checkout.run(sys.executable, "-m", "pipeline.serving.predict", str(tmp_path)).stdout
    table = pd.read_csv(io.StringIO(output), index_col="file", dtype={"class": str})
    expected = Student(checkout.folder / "models/student/student.onnx").probabilities(images)
    np.testing.assert_allclose(table.drop(columns="class").to_numpy(), expected, atol=1e-6)
    assert table["class"].tolist() == [str(number) for number in expected.argmax(1)]
    Image.fromarray(images[0].squeeze()).resize((28, 28)).save(tmp_path / "z.png")
    assert "28x28 pixels; the student takes 8x8" in stage_fails(checkout, "pipeline.serving.predict", str(tmp_path))
    (tmp_path / "z.png").write_bytes(b"no image")
    assert "z.png: cannot be read as an image" in stage_fails(checkout, "pipeline.serving.predict", str(tmp_path))


def test_dvc_can_draw_the_plots(checkout: Checkout):
    checkout.dvc("plots", "show", "--out", "plots")
    page = (checkout.folder / "plots" / "index.html").read_text()
    assert "metrics/plots/distillation/losses.csv" in page.replace("\\", "")
    assert "student_distilled" in page


@pytest.mark.parametrize("setting", ["+kd.temprature=6", "kd.alpha=2", "kd.temperature=hot", "seeds=[0,zero]"])
def test_a_bad_parameter_stops_an_experiment_with_one_line(checkout: Checkout, setting: str):
    before = checkout.by_name()
    done = checkout.run("dvc", "exp", "run", "--temp", "-S", setting, expect=None)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert setting.strip("+").split("=")[0].split(".")[-1] in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert checkout.by_name() == before


def test_a_misspelt_setting_is_stopped_by_dvc_itself(checkout: Checkout):
    assert "temprature" in checkout.dvc("exp", "run", "--temp", "-S", "kd.temprature=6", expect=255)


def stage_fails(checkout: Checkout, *command: str, **environment: str) -> str:
    """Run one stage as DVC would; it must fail in one line on stderr. Returns that line."""
    checkout.environment |= environment
    try:
        done = checkout.run(sys.executable, "-m", *command, expect=1)
    finally:
        for key in environment:
            del checkout.environment[key]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("pathmnits", "pathmnits"),
        ("chestmnist", "several labels"),
        ("nothing.npz", "nothing.npz"),
        ("torn.npz", "torn.npz: truncated"),
        ("labels.npz", "test_labels out of range"),
        ("pathmnist", "cannot download pathmnist.npz"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing_half_written(checkout: Checkout, tmp_path: Path, dataset: str, named: str):
    bad = Checkout(tmp_path / "bad")
    bad.folder.mkdir()
    for name in ("params.yaml", "pipeline", "data/own"):
        (bad.folder / name).parent.mkdir(exist_ok=True)
        bad.run("cp", "-r", str(checkout.folder / name), name)
    write_npz(bad.folder / "labels.npz", test_labels=np.arange(200) % 11)
    (bad.folder / "torn.npz").write_bytes((bad.folder / "labels.npz").read_bytes()[:5000])
    text = (bad.folder / "params.yaml").read_text()
    (bad.folder / "params.yaml").write_text(text.replace("own.npz", dataset))
    proxy = "http://127.0.0.1:9"  # nobody listens there: no network
    line = stage_fails(bad, "pipeline.fetch_data", "baselines", http_proxy=proxy, https_proxy=proxy)
    assert named in line
    assert [path.name for path in (bad.folder / "data").iterdir() if path.name != "downloads"] == ["own"]


def test_a_damaged_checkpoint_stops_the_stages_that_read_it(checkout: Checkout):
    path = checkout.folder / "models" / "distillation" / "teacher" / "seed0.safetensors"
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-10])
    try:
        for command in (["pipeline.distill_student"], ["pipeline.evaluate", "distillation"]):
            assert "models/distillation/teacher/seed0.safetensors" in stage_fails(checkout, *command)
    finally:
        path.write_bytes(content)


def test_changed_content_behind_an_unchanged_path_is_noticed(checkout: Checkout):
    checkout.dvc("repro")
    assert stages_run(checkout.dvc("repro")) == []
    images, _ = np.load(checkout.folder / "own.npz")["test_images"], None
    write_npz(checkout.folder / "own.npz", test_images=255 - images)
    assert stages_run(checkout.dvc("status")) == []
    output = checkout.dvc("repro", "evaluate@distillation")
    assert stages_run(output)[0] == "fetch_data@distillation"
    assert stages_run(output)[-1] == "evaluate@distillation"
