"""A study of small trainings, one after another and on Ray with a worker killed on the way: the same results and MLflow runs."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from faults.checkout import Checkout
from faults.kills import epochs_done, kill_a_worker
from tests.conftest import small_checkout

STUDY = """
target: evaluate@distillation
fixed: {seeds: [0, 1], distillation.epochs: 12}
grids:
  - {title: weights, x: kd.alpha, vary: {kd.alpha: [0.1, 0.7]}}
  - {title: nothing, x: kd.alpha, fixed: {distillation.dataset: missing.npz}, vary: {kd.alpha: [0.3]}}
"""
MADE = ("models/**/*.safetensors", "metrics/*.json", "metrics/*.md", "metrics/predictions/*", "metrics/plots/**/*.csv")
TRAININGS = Counter({"teacher/seed0": 1, "teacher/seed1": 1, "student_alone/seed0": 1, "student_alone/seed1": 1})
TRAININGS += Counter({"student_distilled/seed0": 2, "student_distilled/seed1": 2})


def studied(folder: Path) -> Checkout:
    checkout = small_checkout(folder)
    (folder / "studies" / "small.yaml").write_text(STUDY)
    return checkout


def run(*options: str) -> list[str]:
    return [sys.executable, "-m", "studies.study", "run", "small", *options]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = studied(tmp_path_factory.mktemp("one_by_one") / "checkout")
    checkout.output = checkout.run(*run("--one-by-one"), expect=1)
    return checkout


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The same on two workers, the first of which to be some epochs into a training is killed; `killed` is its workspace."""
    checkout = studied(tmp_path_factory.mktemp("on_ray") / "checkout")
    checkout.environment.pop("RAY_ADDRESS", None)
    process = checkout.start(*run("--workers", "2"))
    checkout.killed = kill_a_worker(checkout.folder, process.pid).name
    checkout.output = process.communicate()[0]
    assert process.returncode == 1
    return checkout


def made(checkout: Checkout) -> dict[str, bytes]:
    """What the tasks have made, their workspaces' links left out, by path."""
    root = checkout.folder / ".studies"
    found = (path for pattern in MADE for path in root.glob(f"*/{pattern}") if not path.is_symlink())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def points(checkout: Checkout) -> dict[tuple[str, str], dict[str, list]]:
    """Every run's metrics as (step, value), but for times and loads, by the run's name and checkpoint or results."""
    client = MlflowClient(f"sqlite:///{checkout.folder}/mlflow.db")
    found = {}
    for one in checkout.mlflow_runs():
        names = [name for name in one.data.metrics if not name.startswith("system/") and "seconds" not in name]
        key = (one.info.run_name, one.data.tags.get("checkpoint_md5") or one.data.tags["summary"])
        assert key not in found
        found[key] = {
            name: [(point.step, point.value) for point in client.get_metric_history(one.info.run_id, name)]
            for name in names
        }
    return found


def tags(checkout: Checkout) -> list[tuple]:
    runs = [one.data for one in checkout.mlflow_runs()]
    said = ("mlflow.source.name", "dvc.stage", "dvc.experiment", "checkpoint_md5", "device")
    return sorted([str([run.tags.get(name) for name in said] + sorted(run.params.items())) for run in runs])


def test_a_killed_worker_loses_nothing(one_by_one: Checkout, on_ray: Checkout):
    done = {path.parent.name: path.read_text() for path in on_ray.folder.glob(".studies/*/done")}
    assert [digest for digest, text in done.items() if '"again": true' in text] == [on_ray.killed]
    assert set(done) == {path.parent.name for path in one_by_one.folder.glob(".studies/*/done")}
    assert not epochs_done(on_ray.folder)
    expected, found = made(one_by_one), made(on_ray)
    assert len(expected) == 8 + 2 * 16  # checkpoints, and what an evaluation makes
    assert {path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)} == set()


def test_the_runs_in_mlflow_are_the_same_point_for_point(one_by_one: Checkout, on_ray: Checkout):
    for checkout in (one_by_one, on_ray):
        trainings = Counter({name: count for name, count in checkout.by_name().items() if "summary" not in name})
        assert trainings == TRAININGS
        assert {one.info.status for one in checkout.mlflow_runs()} == {"FINISHED"}
    expected = points(one_by_one)
    assert all(len(curves["val_loss"]) == 12 for (name, _), curves in expected.items() if "seed" in name)
    assert points(on_ray) == expected
    assert tags(on_ray) == tags(one_by_one)


def test_a_point_that_fails_is_named_and_the_others_finish(one_by_one: Checkout, on_ray: Checkout):
    told = rf"error: small-\w+: fetch_data@distillation: dataset {on_ray.folder}/missing\.npz: there is no such file"
    assert len(re.findall(told, on_ray.output)) == 1
    assert one_by_one.output.stderr.count("\n") == one_by_one.output.stderr.count("error: ") == 1
    for output in (on_ray.output, one_by_one.output.stdout):
        assert len(re.findall(r"small-\w+: finished", output)) == 2
        assert len(re.findall(r"small-\w+: failed", output)) == 1
        assert "small: 3 points, 2 finished; 11 of 19 tasks done now" in output


def test_a_run_says_how_to_repeat_it(on_ray: Checkout):
    commit = on_ray.run("git", "rev-parse", "HEAD").stdout[:12]
    note = {one.info.run_name: one.data.tags["mlflow.note.content"] for one in on_ray.mlflow_runs()}["teacher/seed1"]
    settings = "-S 'distillation.epochs=12' -S 'kd.alpha=0.1' -S 'seeds=[1]'"
    assert note.endswith(f"Again: `git checkout {commit} && dvc exp run {settings} train_teacher`")


def test_a_point_is_what_dvc_makes_of_it(one_by_one: Checkout):
    table = one_by_one.run(sys.executable, "-m", "studies.study", "collect", "small").stdout
    assert "Study small: 2 of 3 points finished" in table
    one_by_one.environment["OMP_NUM_THREADS"] = "1"
    one_by_one.dvc("exp", "run", "-S", "kd.alpha=0.1", "-S", "distillation.epochs=12", "evaluate@distillation")
    by_dvc = {digest: set() for digest in {path.partition("/")[0] for path in made(one_by_one)}}
    for path, content in made(one_by_one).items():
        digest, _, file = path.partition("/")
        by_dvc[digest].add((one_by_one.folder / file).read_bytes() == content)
    # The other point's two distilled students and its evaluation are others.
    assert Counter(map(tuple, by_dvc.values()))[(True,)] == 2 * 3 + 1
    assert len(by_dvc) == 2 * 3 + 1 + 2 + 1
    assert sum("summary" in name for name in one_by_one.by_name().elements()) == 2
