import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.core.errors import UserError
from pipeline.core.files import md5, write_atomic
from pipeline.evaluation.comparisons import Evaluation, write_evaluation
from pipeline.networks.description import Description
from pipeline.tracking import lineage, sync
from pipeline.training.cache import trainings_folder
from tests.tracking.samples import STUDENTS, curve, make_evaluation, make_record, runs

PARAMS = (Path(__file__).parents[2] / "params.yaml").read_text()


def run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command] if command[0] == "dvc" else command, check=True, capture_output=True)


def write_results(folder: Path, temperature: int) -> Evaluation:
    """What stages leave: parameters, checkpoints, an evaluation."""
    params = re.sub(r"(?m)^( +temperature: )\S+", rf"\g<1>{temperature}", PARAMS)
    (folder / "params.yaml").write_text(re.sub(r"(?m)^( +experiment: )\S+", r"\1e", params))
    records, shares = [make_record(seed) for seed in (0, 1)], STUDENTS | {"student_distilled": 0.7 + 0.01 * temperature}
    evaluation = make_evaluation(*records, shares=shares, temperature=temperature)
    for model, entry in evaluation.detail["models"].items():
        for row, record in enumerate(records):
            of_model = {"model": model, "digest": entry["digests"][row]} | {key: entry[key] for key in ("setting", "parameters")}
            description = record.model_copy(update=of_model).model_dump_json(include=set(Description.model_fields))
            path = folder / f"models/distillation/{model}/seed{record.seed}.safetensors"
            write_atomic(path, save({"weight": np.zeros(3, np.float32)}, {"description": description}))
            entry["checkpoints"][row] = md5(path)
    write_evaluation(evaluation, folder)
    return evaluation


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout at temperature 5 with an experiment at 6, which shares the student that is trained alone."""
    folder = tmp_path_factory.mktemp("template")
    stages = [f"  train_{model}: {{cmd: 'true', outs: [models/distillation/{model}]}}" for model in STUDENTS]
    metrics = "metrics/distillation.json: {cache: false}"
    cached = "metrics/detail/distillation.json, metrics/predictions/distillation.npz"
    stages.append(f"  evaluate: {{cmd: 'true', outs: [{cached}], metrics: [{metrics}]}}")
    (folder / "dvc.yaml").write_text("\n".join(["stages:", *stages, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("DVC_ROOT", "DVC_STAGE"):
            patch.delenv(name, raising=False)
        for role in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{role}_NAME", "n")
            patch.setenv(f"GIT_{role}_EMAIL", "e@example.org")
        run("git", "init", "-q")
        run("dvc", "init", "-q")
        write_results(folder, 5)
        run("dvc", "commit", "-f", "-q")
        run("git", "add", "-A")
        run("git", "commit", "-qm", "first")
        write_results(folder, 6)
        run("dvc", "commit", "-f", "-q")
        run("dvc", "exp", "save", "-n", "warm-owl")
        run("git", "checkout", "-q", ".")
        run("dvc", "checkout", "-q")
    return folder


@pytest.fixture
def committed() -> None:
    """What git really holds."""


@pytest.fixture(autouse=True)
def checkout(template: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to stand in, without a git identity."""
    shutil.copytree(template, store, dirs_exist_ok=True)
    monkeypatch.chdir(store)
    monkeypatch.setattr("pipeline.core.provenance.PIPELINE", store / "pipeline")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    return store


def names(*models: str) -> set[str]:
    return {f"{model}{seed}" for model in models for seed in ("", "/seed0", "/seed1")}


def test_the_store_gets_the_workspace_and_every_experiment_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    sync.main()
    before = runs()
    sync.main()
    assert set(before) == names("student_distilled", "student_distilled T=6", "student_alone")
    assert {name: run.data.tags for name, run in runs().items()} == {name: run.data.tags for name, run in before.items()}
    first, other, lone = (runs()[name] for name in ("student_distilled", "student_distilled T=6", "student_alone"))
    assert other.data.tags["dvc.experiment"] == "warm-owl"
    assert "dvc.experiment" not in first.data.tags | lone.data.tags
    for run, temperature in ((first, 5), (other, 6)):
        (tmp_path / f"again{temperature}").mkdir()
        evaluation = write_results(tmp_path / f"again{temperature}", temperature)
        assert run.data.metrics["test_accuracy"] == evaluation.metrics["student_distilled"]["accuracy"]
        assert run.data.tags["dvc.stage"] == "train_student_distilled"
    assert other.data.tags["repeat"].endswith("dvc exp run --temp -S kd.temperature=6 train_student_distilled`")
    child = runs()["student_distilled T=6/seed1"]
    assert child.data.tags["mlflow.parentRunId"] == other.info.run_id
    assert [step for step, _ in curve(child, "val_loss")] == [1, 2, 3]
    assert len(curve(child, "test_accuracy")) == 1
    assert "in the store: 6 trainings of the workspace, 1 experiments" in capsys.readouterr().out


def test_a_finished_training_is_synced_with_its_times_and_loads_though_nothing_else_is_there(checkout: Path):
    shutil.rmtree(checkout / ".git")
    shutil.rmtree(checkout / "models")
    (checkout / "dvc.lock").unlink()
    write_atomic(trainings_folder() / "teacher-0/record.json", make_record().model_dump_json())
    write_atomic(trainings_folder() / "teacher-1/record.json", make_record(1, finished=False).model_dump_json())
    write_atomic(trainings_folder() / "teacher-2/record.json", "{}")
    sync.main()
    assert set(runs()) == {"teacher", "teacher/seed0"} | names(*STUDENTS)
    assert runs()["teacher/seed0"].data.metrics["training_seconds"] == 4.5


def test_a_store_that_is_away_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("TRACK_LATER", "1")
    with pytest.raises(UserError, match="make sync again"):
        sync.main()


def test_what_dvc_does_not_have_is_skipped_with_a_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(checkout / "site"))  # DVC remembers folders there
    shutil.rmtree(checkout / ".dvc/cache")
    damaged = "models/distillation/student_alone/seed0.safetensors"
    (checkout / damaged).write_bytes(b"damaged")
    sync.main()
    assert set(runs()) == names(*STUDENTS)
    assert [line.split(": ")[:3] for line in sorted(capsys.readouterr().out.splitlines()[:-1])] == [
        ["skipped", "warm-owl", "evaluation of distillation"],
        ["skipped", "warm-owl", "models/distillation/student_alone"],
        ["skipped", "warm-owl", "models/distillation/student_distilled"],
        ["skipped", "workspace", damaged],
    ]


def test_lineage_names_the_runs_of_a_file_an_export_a_revision_and_an_experiment(checkout: Path, capsys: pytest.CaptureFixture):
    def printed(target: object) -> str:
        capsys.readouterr()
        lineage.main(str(target))
        return capsys.readouterr().out

    exported = Path("models/exported/distillation")
    lone = Path("models/distillation/student_alone/seed1.safetensors")
    distilled = Path("models/distillation/student_distilled/seed0.safetensors")
    choice = {"checkpoint": lone.name, "checkpoint_md5": md5(lone)}
    choice |= {"teacher": {"checkpoint": distilled.name, "checkpoint_md5": md5(distilled)}}
    write_atomic(exported / "choice.json", json.dumps(choice))
    for name in ("student.onnx", "teacher_int8.onnx"):
        write_atomic(exported / name, b"")
    assert "no run in this store: make sync" in printed(lone)
    sync.main()
    described = printed(lone)
    assert described.startswith(f"{lone}  {md5(lone)}\n    student_alone/seed1, run ")
    assert "finished" in described
    assert ", stage train_student_alone, test accuracy 0." in described
    assert described.partition("\n")[2] in printed(exported / "student.onnx")
    assert f"of {distilled.name}  {md5(distilled)}\n    student_distilled/seed0, run " in printed(exported / "teacher_int8.onnx")
    assert described in printed("HEAD")
    of_experiment = printed("warm-owl")
    assert described in of_experiment
    assert "student_distilled T=6/seed0, run " in of_experiment
    assert ", experiment warm-owl, " in of_experiment


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nonsense", "neither a file nor a git revision nor a DVC experiment"),
        ("HEAD", "dvc fetch"),
        ("elsewhere/student.onnx", "choice.json"),
        ("models/exported/distillation/student.onnx", "choice.json"),
        ("models", "neither"),
    ],
)
def test_lineage_says_in_a_line_what_is_missing(target: str, message: str, checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(checkout / "site"))
    shutil.rmtree(checkout / ".dvc/cache")
    for folder in ("elsewhere", "models/exported/distillation"):
        write_atomic(checkout / folder / "student.onnx", b"")
    write_atomic(checkout / "models/exported/distillation/choice.json", "{}")
    with pytest.raises(UserError, match=message):
        lineage.main(target)
