"""A study of small trainings: one by one, interrupted on the way, and on Ray, with a worker killed on the way."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.training.cache import Record, read_record
from tests.conftest import Checkout, small_checkout, write_npz

EPOCHS = 20
STUDY = f"""
fixed: {{seeds: [0, 1], distillation.epochs: {EPOCHS}}}
grids:
  - {{title: weights, x: kd.alpha, vary: {{kd.alpha: [0.1, 0.7]}}}}
  - {{title: nothing, x: kd.alpha, fixed: {{distillation.dataset: missing.npz}}, vary: {{kd.alpha: [0.3]}}}}
"""
STAGES = """
from pathlib import Path
from pipeline import distill_student, train_student_alone, train_teacher
from pipeline.params import load_params
from pipeline.training.recipe import train
params, (data,) = load_params(), (path for path in Path(".studies/data").iterdir() if path.is_dir())
teacher = train(train_teacher.recipe(params, 0, data), Path("stages"), lambda record: None)
for recipe in (train_student_alone.recipe(params, 0, data), distill_student.recipe(params, 0, data, teacher)):
    train(recipe, Path("stages"), lambda record: None)
"""
RUN = (sys.executable, "-m", "studies.study", "run", "small")
COLLECT = (sys.executable, "-m", "studies.study", "collect", "small")


def start(folder: Path, *options: str) -> tuple[Checkout, subprocess.Popen, Record]:
    """A study that was just started, and the record of a training that is some epochs from its start and its end."""
    checkout = small_checkout(folder)
    checkout.environment.pop("RAY_ADDRESS", None)
    (folder / "studies" / "small.yaml").write_text(STUDY)
    process = checkout.start(*RUN, *options)
    while process.poll() is None:
        for path in folder.glob(".trainings/*/record.json"):
            if (record := read_record(path.parents[1], path.parent.name)) and 2 <= len(record.history) < EPOCHS - 5:
                return checkout, process, record
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout, process, checkout.interrupted = start(tmp_path_factory.mktemp("one_by_one") / "checkout", "--one-by-one")
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0].endswith("interrupted: the same command resumes\n")
    assert process.returncode == 130
    done = checkout.run(*RUN, "--one-by-one", expect=1)
    checkout.output = done.stdout + done.stderr
    return checkout


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout, process, record = start(tmp_path_factory.mktemp("on_ray") / "checkout", "--workers", "2")
    checkout.interrupted = record
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    checkout.sockets = [socket for member in family for socket in member.net_connections()]
    (worker,) = (member for member in family if member.cmdline()[:1] == [f"ray::{record.model}/seed{record.seed}"])
    worker.kill()
    checkout.output = process.communicate()[0]
    assert process.returncode == 1
    return checkout


def made(checkout: Checkout) -> dict[str, bytes]:
    """Checkpoints and results by path."""
    paths = [path for pattern in (".trainings/*/*.safetensors", ".studies/*.json") for path in checkout.folder.glob(pattern)]
    return {str(path.relative_to(checkout.folder)): path.read_bytes() for path in paths}


def test_interrupted_or_on_ray_with_a_killed_worker_it_makes_the_same_bytes(one_by_one: Checkout, on_ray: Checkout):
    for checkout in (one_by_one, on_ray):
        record = read_record(checkout.folder / ".trainings", checkout.interrupted.digest)
        assert (record.finished, record.started) == (True, checkout.interrupted.started)
        assert record.loads[:2] == checkout.interrupted.loads[:2]  # these epochs were not trained again
    assert len(made(one_by_one)) == 2 * (1 + 1 + 2) + 2
    assert made(on_ray) == made(one_by_one)


def test_the_stages_make_the_same_bytes(one_by_one: Checkout):
    one_by_one.set(distillation__epochs=EPOCHS, kd__alpha=0.1)
    one_by_one.run(sys.executable, "-c", STAGES)
    checkpoints = list(one_by_one.folder.glob("stages/*/checkpoint.safetensors"))
    assert len(checkpoints) == 3
    for path in checkpoints:
        assert (one_by_one.folder / ".trainings" / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_ray_listens_on_this_machine_alone(on_ray: Checkout):
    addresses = {socket.laddr.ip.removeprefix("::ffff:") for socket in on_ray.sockets if socket.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}


def test_each_training_has_its_run_in_mlflow(one_by_one: Checkout, on_ray: Checkout):
    assert one_by_one.by_name() == on_ray.by_name()
    assert sum(count for name, count in on_ray.by_name().items() if "/seed" in name) == 8
    assert {run.info.status for run in on_ray.mlflow_runs()} == {"FINISHED"}


def test_a_point_that_fails_is_named_and_the_others_finish(one_by_one: Checkout, on_ray: Checkout):
    for checkout in (one_by_one, on_ray):
        reason = rf"error: small-\w+: prepare_data: dataset {checkout.folder}/missing\.npz: there is no such file"
        assert len(re.findall(reason, checkout.output)) == checkout.output.count("error: small") == 1
        assert len(re.findall(r"small-\w+: finished", checkout.output)) == 2
        assert "small: 3 points, 2 finished; 11 of 19 tasks done now" in checkout.output


def test_the_same_command_does_what_is_missing(on_ray: Checkout):
    before = made(on_ray)
    assert "Study small: 2 of 3 points finished" in on_ray.run(*COLLECT).stdout
    write_npz(on_ray.folder / "missing.npz")
    assert "small: 3 points, 3 finished; 8 of 8 tasks done now" in on_ray.run(*RUN, "--one-by-one").stdout
    assert before.items() <= made(on_ray).items()
    assert "Study small: 3 of 3 points finished" in on_ray.run(*COLLECT).stdout
