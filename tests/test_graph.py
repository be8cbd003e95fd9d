"""The graph: one real `dvc repro` on small images, what dvc.yaml declares against what the stages did, and what they left.

The tests of this file share the run and leave its results as they are.
"""

import ast
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dvc.repo import Repo
from mlflow import MlflowClient
from PIL import Image

from pipeline.export.onnx_model import Student
from pipeline.params import TRACKS, load_params
from tests.checkout import Checkout
from tests.conftest import ROOT, small_checkout, stages_run, write_npz

OF_A_TRACK = ("fetch_data", "distill_student", "evaluate", "export_student", "evaluate_export", "measure_cost", "report")
STAGES = ["train_teacher", "train_student_alone", "train_baselines@simple_cnn", "train_baselines@resnet18"]
STAGES += [f"{stage}@{track}" for stage in OF_A_TRACK for track in TRACKS]
TRAINING_STAGES = {stage for stage in STAGES if stage.startswith(("train_", "distill_"))}
MODELS = {model for track in TRACKS.values() for model in track.models}
TRAININGS = {f"{model}/seed{seed}" for model in MODELS for seed in (0, 1)}
NOT_DECLARED = ("core", "tracking", "serving", "params.py")  # code that decides no byte of any output
DECIDE_NO_BYTE = frozenset({"jobs", "tracking.experiment"})  # parameters of no stage
OF_METHODS = frozenset(load_params(ROOT / "params.yaml").flat("distill", "kd", "dkd", "dist", "wttm", "rkd"))
OF_OTHER_METHODS = frozenset(name for name in OF_METHODS if not name.startswith(("distill.", "kd.")))  # than that of params.yaml


@dataclass(frozen=True)
class Declared:
    """Of a stage in dvc.yaml, as DVC sees it."""

    code: frozenset[str]
    data: frozenset[str]
    params: frozenset[str]  # spelt out to single values
    outs: frozenset[str]


@dataclass
class Observed:
    """Of a stage that has run. Paths are relative to the checkout."""

    code: set[str]
    params: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which the whole graph has run; `output` is what DVC said, `notes` the folder of tests/observer's notes."""
    checkout = small_checkout(tmp_path_factory.mktemp("graph") / "checkout")
    checkout.notes = tmp_path_factory.mktemp("notes")
    before = dict(checkout.environment)
    path = os.pathsep.join([str(ROOT / "tests/observer"), str(checkout.folder)])
    checkout.environment |= {"PYTHONPATH": path, "OBSERVED": str(checkout.notes), "OMP_NUM_THREADS": "1"}  # timings are none here
    done = checkout.run("dvc", "repro", timeout=900)
    checkout.output = done.stdout + done.stderr
    checkout.environment = before
    return checkout


@pytest.fixture(scope="module")
def declared(checkout: Checkout) -> dict[str, Declared]:
    params, stages = load_params(checkout.folder / "params.yaml"), {}
    with Repo(str(checkout.folder)) as repo:
        for stage in repo.index.stages:
            deps = {dep.def_path for dep in stage.deps if not hasattr(dep, "params")}
            keys = [key for dep in stage.deps if hasattr(dep, "params") for key in dep.params]
            code = frozenset(dep for dep in deps if dep.startswith("pipeline/"))
            outs = frozenset(out.def_path for out in stage.outs)
            stages[stage.name] = Declared(code, frozenset(deps - code), frozenset(params.flat(*keys)), outs)
    return stages


@pytest.fixture(scope="module")
def observed(checkout: Checkout) -> dict[str, Observed]:
    stages = {}
    for name in STAGES:
        stages[name] = Observed(imported_code(name.split("@")[0]))
        kinds = {"reads": stages[name].read, "writes": stages[name].written, "param": stages[name].params}
        for line in (checkout.notes / name).read_text().splitlines():
            kind, _, value = line.partition(" ")
            kinds[kind].add(value)
        if name.startswith("train_"):  # which refuse a method early, and do nothing else by it
            stages[name].params -= OF_METHODS
    return stages


def imported_code(stage: str) -> set[str]:
    """The stage's file and every package that it reaches, but those that decide no byte; imports inside functions count too."""
    reached: set[str] = set()
    waiting = [f"pipeline/{stage}.py"]
    while waiting:
        current = waiting.pop()
        if current in reached:
            continue
        reached.add(current)
        for node in ast.walk(ast.parse((ROOT / current).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            candidates = (Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith("pipeline."))
            waiting.extend(str(path) for path in candidates if (ROOT / path).is_file() and path.parts[1] not in NOT_DECLARED)
    return {path if path.count("/") == 1 else str(Path(path).parent) for path in reached}


def covers(paths: frozenset[str], path: str) -> bool:
    return any(path == outer or path.startswith(f"{outer}/") for outer in paths)


def problems(stage: Declared, did: Observed) -> list[str]:
    """How the declaration of a stage differs from what it does."""
    beside = {str(parent) for path in did.written for parent in Path(path).parents}  # tidied up before writing
    read = {path for path in did.read - did.written - beside if not covers(stage.outs, path)}
    return [
        *(f"imports {path}, no dependency" for path in did.code - stage.code),
        *(f"depends on {path}, not imported" for path in stage.code - did.code),
        *(f"reads {name}, not under params" for name in did.params - stage.params - DECIDE_NO_BYTE),
        *(f"has {name} under params, never reads it" for name in stage.params - did.params - OF_OTHER_METHODS),
        *(f"reads {path}, no dependency" for path in read if not covers(stage.data, path)),
        *(f"depends on {path}, never reads it" for path in stage.data if not any(covers(frozenset([path]), r) for r in read)),
        *(f"writes {path}, no output" for path in did.written if not covers(stage.outs, path)),
    ]


def test_repro_runs_every_stage_and_ends_with_the_tables(checkout: Checkout, declared: dict[str, Declared]):
    assert set(declared) == set(STAGES)
    assert sorted(stages_run(checkout.output)) == sorted(STAGES)
    for track in TRACKS:
        assert (checkout.folder / "metrics" / f"{track}.md").read_text().strip() in checkout.output


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_exactly_what_it_reads_and_writes(declared: dict, observed: dict, name: str):
    assert problems(declared[name], observed[name]) == []


def test_any_entry_left_out_of_deps_params_or_outs_is_found(declared: dict[str, Declared], observed: dict[str, Observed]):
    for name, stage in declared.items():
        for kind in ("code", "data", "params", "outs"):
            for entry in getattr(stage, kind):
                rest = getattr(stage, kind) - {entry}
                if entry in OF_OTHER_METHODS:
                    continue
                assert problems(replace(stage, **{kind: rest}), observed[name]) or covers(rest, entry), (name, entry)


def test_only_evaluations_and_reports_read_a_test_split(observed: dict[str, Observed]):
    readers = {name for name, did in observed.items() if any("/test/" in path for path in did.read - did.written)}
    assert readers == {stage for stage in STAGES if stage.startswith(("evaluate", "report"))}


def test_every_parameter_is_read_by_some_stage(checkout: Checkout, observed: dict[str, Observed]):
    params = load_params(checkout.folder / "params.yaml")
    assert set().union(*(did.params for did in observed.values())) | OF_OTHER_METHODS == set(
        params.flat(*type(params).model_fields)
    )


@pytest.mark.parametrize(
    ("package", "stages"),
    [
        ("core", set()),
        ("tracking", set()),
        ("serving", set()),
        ("reporting", {"report@baselines", "report@distillation"}),
        ("evaluation", {stage for stage in STAGES if stage.startswith(("evaluate", "export_", "report@"))}),
        ("training", TRAINING_STAGES | {"measure_cost@baselines", "measure_cost@distillation"}),
        ("networks", set(STAGES)),
    ],
)
def test_a_package_is_a_unit_of_staleness(declared: dict[str, Declared], package: str, stages: set[str]):
    assert {name for name, stage in declared.items() if f"pipeline/{package}" in stage.code} == stages


def test_a_second_repro_has_nothing_to_do_and_a_changed_package_makes_stale_what_depends_on_it(checkout: Checkout):
    output = checkout.dvc("repro")
    assert stages_run(output) == []
    assert output.count("didn't change, skipping") == len(STAGES)
    path = checkout.folder / "pipeline/reporting/__init__.py"
    before = path.read_text()
    path.write_text(before + "# changed\n")
    checkout.set(tracking__experiment="another", jobs=1)
    stale = json.loads(checkout.run("dvc", "status", "--json").stdout)
    path.write_text(before)
    checkout.set(tracking__experiment="small-image-distillation", jobs="auto")
    assert set(stale) == {"report@baselines", "report@distillation"}


def test_dvc_has_the_headline_figures_alone(checkout: Checkout):
    for name, track in TRACKS.items():
        headline = json.loads((checkout.folder / f"metrics/{name}.json").read_text())
        metrics = json.loads((checkout.folder / f"metrics/detail/{name}.json").read_text())["metrics"]
        assert headline.keys() - {"gain"} == set(track.models) == set(metrics), "of two seeds, no interval"
        assert all(headline[model] == {"accuracy": metrics[model]["accuracy"]} for model in metrics)


def test_every_training_is_a_run_with_curves_and_test_results_of_its_checkpoint(checkout: Checkout):
    runs = {run.info.run_name: run for run in checkout.mlflow_runs()}
    assert checkout.by_name() == dict.fromkeys(TRAININGS | MODELS, 1)
    metrics = json.loads((checkout.folder / "metrics/detail/distillation.json").read_text())["metrics"]
    accuracies = [runs[f"teacher/seed{seed}"].data.metrics["test_accuracy"] for seed in (0, 1)]
    assert np.mean(accuracies) == pytest.approx(metrics["teacher"]["accuracy"])
    assert runs["teacher"].data.metrics["test_accuracy_ci95"] == metrics["teacher"]["accuracy_ci95"]
    assert runs["teacher/seed1"].data.tags["mlflow.parentRunId"] == runs["teacher"].info.run_id
    assert runs["student_distilled"].data.tags["verdict"] == "a smoke test", "of two seeds"
    client = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db")
    for name in TRAININGS:
        assert {"train_loss", "val_loss", "train_accuracy", "val_accuracy", "test_auc"} <= set(runs[name].data.metrics)
        artifacts = {file.path for file in client.list_artifacts(runs[name].info.run_id)}
        assert artifacts == {"classification_report.txt", "confusion_matrix.png"}


def test_dvc_can_draw_the_plots(checkout: Checkout):
    checkout.dvc("plots", "show", "--out", "plots")
    page = (checkout.folder / "plots" / "index.html").read_text()
    assert "metrics/plots/distillation/losses.csv" in page.replace("\\", "")
    assert "student_distilled" in page


def test_a_folder_of_images_becomes_a_table(checkout: Checkout, tmp_path: Path):
    images = np.load(checkout.folder / "data/distillation/test/images.npy")[:5]
    for number, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{number}.png")
    command = f"serving.predict {tmp_path} --model models/exported/distillation/student.onnx"
    output = checkout.run(*checkout.stage(command)).stdout
    table = pd.read_csv(io.StringIO(output), index_col="file", dtype={"class": str})
    expected = Student(checkout.folder / "models/exported/distillation/student.onnx").probabilities(images)
    np.testing.assert_allclose(table.drop(columns="class").to_numpy(), expected, atol=1e-6)
    assert table["class"].tolist() == [str(number) for number in expected.argmax(1)]
    Image.fromarray(images[0].squeeze()).resize((28, 28)).save(tmp_path / "z.png")
    assert "28x28 pixels; the student takes 8x8" in stage_fails(checkout, command)
    (tmp_path / "z.png").write_bytes(b"no image")
    assert "z.png: cannot be read as an image" in stage_fails(checkout, command)


def test_students_are_published_with_a_card_if_the_figures_are_theirs(checkout: Checkout, tmp_path: Path):
    published, images = checkout.folder / "models/student", np.load(checkout.folder / "data/baselines/test/images.npy")[:1]
    Image.fromarray(images[0].squeeze()).save(tmp_path / "a.png")
    checkout.run(*checkout.stage("serving.publish"))
    exported = (checkout.folder / "models/exported/baselines/student.onnx").read_bytes()
    assert (published / "baselines.onnx").read_bytes() == exported
    assert sha256(exported).hexdigest() in (published / "README.md").read_text()
    (row,) = pd.read_csv(io.StringIO(checkout.run(*checkout.stage(f"serving.predict {tmp_path}/a.png")).stdout)).values.tolist()
    assert row[2:] == pytest.approx(Student(published / "baselines.onnx").probabilities(images)[0], abs=1e-6)
    costs = checkout.folder / "metrics/distillation_costs.json"
    before = costs.read_text()
    costs.write_text(re.sub(r'("student.onnx": {[^}]*"file_bytes": )', r"\g<1>1", before))
    failed = stage_fails(checkout, "serving.publish")
    costs.write_text(before)
    assert "distillation/student.onnx: the figures in metrics are of another export: dvc repro report@distillation" in failed


def stage_fails(checkout: Checkout, stage: str) -> str:
    """Run one stage as DVC would; it must fail in one line on stderr. Returns that line."""
    (line,) = checkout.run(*checkout.stage(stage), expect=1).stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_damaged_checkpoint_stops_the_stage_that_reads_it(checkout: Checkout):
    path = checkout.folder / "models" / "distillation" / "teacher" / "seed0.safetensors"
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-10])
    try:
        assert "models/distillation/teacher/seed0.safetensors" in stage_fails(checkout, "distill_student distillation")
    finally:
        path.write_bytes(content)


def test_bad_data_is_one_line_and_leaves_nothing_half_written(checkout: Checkout, tmp_path: Path):
    bad = Checkout(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("params.yaml", "pipeline", "data/own"):
        bad.run("cp", "-r", str(checkout.folder / name), name)
    bad.set(baselines__dataset="torn.npz")
    (tmp_path / "torn.npz").write_bytes(write_npz(tmp_path / "whole.npz").read_bytes()[:5000])
    assert "torn.npz: truncated" in stage_fails(bad, "fetch_data baselines")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["own"]


def test_a_store_that_is_away_changes_no_byte_and_sync_completes_it(checkout: Checkout):
    checkpoints = checkout.folder / "models/distillation/student_alone"
    before, environment = {path.name: path.read_bytes() for path in checkpoints.iterdir()}, dict(checkout.environment)
    checkout.environment |= {"TRACK_LATER": "1", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "RETRAIN": "1"}
    assert "make sync brings the store up to date" in checkout.run(*checkout.stage("train_student_alone")).stderr
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    uri = f"sqlite:///{checkout.folder}/synced.db"
    checkout.environment = environment | {"MLFLOW_TRACKING_URI": uri}
    checkout.run(*checkout.stage("tracking.sync"))
    checkout.environment = environment
    runs = {run.info.run_name: run for run in checkout.mlflow_runs(uri)}
    assert set(runs) == TRAININGS | MODELS
    assert all("test_accuracy" in run.data.metrics for run in runs.values())


def test_dvc_and_mlflow_send_nothing_home(tmp_path: Path):
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config
    asked = "import pipeline.tracking.mirror, mlflow.telemetry.client as t; print(t.get_telemetry_client())"
    done = subprocess.run(  # with no environment that would turn it off by itself, such as CI
        [sys.executable, "-c", asked], cwd=ROOT, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"
