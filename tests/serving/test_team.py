"""What a team shares: a tracking server on PostgreSQL, and DVC's data on S3. With the real PostgreSQL, and moto for S3."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from tests.checkout import Checkout, free_port
from tests.conftest import ROOT, small_checkout
from tests.serving.conftest import running

pytestmark = pytest.mark.slow


@pytest.fixture
def tracking_server() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to the user postgres
    folder.chmod(0o755)
    port, path = free_port(), f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ROOT / "team" / "tracking_server.sh", folder, port
    with running(port, *command, env=os.environ | {"PATH": path}, start_new_session=True):
        yield f"http://127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not list(Path("/").glob("usr/lib/postgresql/*/bin/initdb")), reason="needs PostgreSQL")
def test_several_machines_log_into_one_server_and_none_sees_its_store(tracking_server: str, tmp_path: Path):
    machines = [small_checkout(tmp_path / name) for name in ("one", "two")]
    for machine in machines:
        machine.environment["MLFLOW_TRACKING_URI"] = tracking_server
        machine.run(*machine.stage("fetch_data distillation"))
    for stages in (["train_teacher", "train_student_alone"], ["distill_student distillation"], ["evaluate distillation"]):
        at_once = [
            subprocess.Popen(machine.stage(stage), cwd=machine.folder, env=machine.environment)
            for machine in machines
            for stage in stages
        ]
        assert {process.wait(timeout=240) for process in at_once} == {0}
    assert not any((machine.folder / name).exists() for machine in machines for name in ("mlflow.db", "mlartifacts"))
    runs = machines[0].mlflow_runs(tracking_server)
    models = ("teacher", "student_distilled", "student_alone")
    expected = [name for model in models for name in (model, f"{model}/seed0", f"{model}/seed1")]
    # The same training on two machines is one run.
    assert machines[0].by_name(tracking_server) == dict.fromkeys(expected, 1)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.info.artifact_uri.startswith("mlflow-artifacts:/") for run in runs)
    assert all("test_accuracy" in run.data.metrics for run in runs)
    student = next(run for run in runs if run.info.run_name == "student_distilled/seed0")
    files = MlflowClient(tracking_server).list_artifacts(student.info.run_id)
    assert "confusion_matrix.png" in {file.path for file in files}


def test_what_was_pushed_to_s3_is_pulled_into_an_empty_clone_and_nothing_is_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    s3 = f"http://127.0.0.1:{port}"
    first, second = small_checkout(tmp_path / "first"), Checkout(tmp_path / "second")
    with running(port, sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port, stderr=subprocess.DEVNULL):
        boto3.client("s3", endpoint_url=s3).create_bucket(Bucket="team")
        first.set(distillation__dataset="mnist5k", seeds=[0])
        first.dvc("repro", "train_student_alone")
        first.dvc("remote", "add", "--default", "team", "s3://team/store")
        first.dvc("remote", "modify", "team", "endpointurl", s3)
        first.run("git", "add", "-A")
        first.run("git", "commit", "-qm", "results and remote")
        assert "pushed" in first.dvc("push")
        subprocess.run(["git", "clone", "-q", first.folder, second.folder], check=True)
        second.dvc("pull", "--with-deps", "train_student_alone")
    assert "Running stage" not in second.dvc("repro", "train_student_alone")
    checkpoint = "models/distillation/student_alone/seed0.safetensors"
    assert (second.folder / checkpoint).read_bytes() == (first.folder / checkpoint).read_bytes()
