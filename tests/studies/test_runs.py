"""A study of small trainings: one by one, interrupted on the way, and on Ray, with a worker killed on the way."""

import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.training.cache import read_record
from tests.conftest import Checkout, small_checkout, write_npz

pytestmark = pytest.mark.slow
EPOCHS = 40
STUDY = f"""
fixed: {{seeds: [0, 1], distillation.epochs: {EPOCHS}}}
grids:
  - {{title: weights, x: kd.alpha, vary: {{kd.alpha: [0.1, 0.7]}}}}
  - {{title: nothing, x: kd.alpha, fixed: {{distillation.dataset: missing.npz}}, vary: {{kd.alpha: [0.3]}}}}
"""
STUDIES = (sys.executable, "-m", "studies.study")
RUN = (*STUDIES, "run", "small")


def start(folder: Path, *options: str) -> Checkout:
    """A checkout with a study just started, its `process`, and in `interrupted` the record of a training in its middle."""
    checkout = small_checkout(folder)
    checkout.environment.pop("RAY_ADDRESS", None)
    (folder / "studies" / "small.yaml").write_text(STUDY)
    checkout.process = checkout.start(*RUN, *options)
    while checkout.process.poll() is None:
        for path in folder.glob(".trainings/*/record.json"):
            checkout.interrupted = read_record(path.parents[1], path.parent.name)
            if checkout.interrupted and 2 <= len(checkout.interrupted.history) < EPOCHS / 2:
                return checkout
        time.sleep(0.01)
    raise AssertionError(checkout.process.communicate()[0])


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = start(tmp_path_factory.mktemp("one_by_one") / "checkout", "--one-by-one")
    checkout.process.send_signal(signal.SIGINT)
    assert checkout.process.communicate()[0].endswith("interrupted: the same command resumes\n")
    assert checkout.process.returncode == 130
    done = checkout.run(*RUN, "--one-by-one", expect=1)
    checkout.output = done.stdout + done.stderr
    return checkout


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = start(tmp_path_factory.mktemp("on_ray") / "checkout", "--workers", "2")
    main, title = psutil.Process(checkout.process.pid), f"{checkout.interrupted.model}/seed{checkout.interrupted.seed}"
    family = [main, *main.children(recursive=True)]
    (worker,) = (member for member in family if member.cmdline()[:1] == [f"ray::{title}"])
    worker.suspend()
    checkout.sockets = [socket for member in family for socket in member.net_connections()]
    worker.kill()
    checkout.output = checkout.process.communicate()[0]
    assert checkout.process.returncode == 1
    return checkout


def made(checkout: Checkout) -> dict[str, bytes]:
    """Checkpoints and results by path."""
    paths = [*checkout.folder.glob(".trainings/*/*.safetensors"), *checkout.folder.glob(".studies/*.json")]
    return {str(path.relative_to(checkout.folder)): path.read_bytes() for path in paths}


def test_both_engines_resume_and_make_the_same(one_by_one: Checkout, on_ray: Checkout):
    for checkout in (one_by_one, on_ray):
        record = read_record(checkout.folder / ".trainings", checkout.interrupted.digest)
        assert (record.finished, record.started) == (True, checkout.interrupted.started)
        assert record.loads[:2] == checkout.interrupted.loads[:2]  # these epochs were not trained again
        reason = rf"error: small-\w+: prepare_data: dataset {checkout.folder}/missing\.npz: there is no such file"
        assert len(re.findall(reason, checkout.output)) == checkout.output.count("error: small") == 1
        assert len(re.findall(r"small-\w+: finished", checkout.output)) == 2
        assert "small: 3 points, 2 finished; 11 of 19 tasks done now" in checkout.output
        assert {run.info.status for run in checkout.mlflow_runs()} == {"FINISHED"}
    assert len(made(one_by_one)) == 2 * (1 + 1 + 2) + 2
    assert made(on_ray) == made(one_by_one)
    assert one_by_one.by_name() == on_ray.by_name()
    assert sum(count for name, count in on_ray.by_name().items() if "/seed" in name) == 8


def test_ray_listens_on_this_machine_alone(on_ray: Checkout):
    addresses = {socket.laddr.ip.removeprefix("::ffff:") for socket in on_ray.sockets if socket.status == psutil.CONN_LISTEN}
    assert addresses == {"127.0.0.1"}


def test_the_same_command_does_what_is_missing(on_ray: Checkout):
    before = made(on_ray)
    assert "Study small: 2 of 3 points finished" in on_ray.run(*STUDIES, "collect", "small").stdout
    write_npz(on_ray.folder / "missing.npz")
    assert "small: 3 points, 3 finished; 8 of 8 tasks done now" in on_ray.run(*RUN, "--one-by-one").stdout
    assert before.items() <= made(on_ray).items()


def test_the_stages_find_the_trainings(one_by_one: Checkout):
    one_by_one.set(distillation__epochs=EPOCHS, kd__alpha=0.1)
    one_by_one.run(*one_by_one.stage("fetch_data distillation"))
    for stage in ("train_teacher", "distill_student distillation"):
        assert one_by_one.run(*one_by_one.stage(stage)).stdout.count("taken from .trainings/") == 2
