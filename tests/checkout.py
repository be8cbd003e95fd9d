"""A copy of the project to do anything to: a git repository of its own with small parameters, and a shell in it."""

import contextlib
import functools
import operator
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.core.files import md5

ROOT = Path(__file__).parents[1]
# Both tracks on the images inside an installed package.
SMALL = {"baselines__dataset": "mnist5k", "baselines__pretrained": False, "distillation__dataset": "mnist5k"}
CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


class Checkout:
    """A checkout and a shell in it, without this process's settings for DVC, MLflow and data."""

    def __init__(self, folder: Path, experiment: str | None = None) -> None:
        self.folder, self.experiment = folder, experiment  # of MLflow, whose runs are looked at; None: all
        foreign = ("DVC_", "MLFLOW_", "DATA_MIRROR", "RETRAIN", "TRAININGS_", "TRACK_LATER")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | {"PATH": path}

    @property
    def options(self) -> dict[str, Any]:
        """How a command is run here."""
        return {"cwd": self.folder, "env": self.environment, "text": True}

    def run(self, *command: str, expect: int | None = 0, timeout: int = 900) -> subprocess.CompletedProcess:
        """Run a command to its end. Raises AssertionError if its exit status is not the expected one."""
        done = subprocess.run(command, **self.options, capture_output=True, timeout=timeout, check=False)
        assert expect is None or done.returncode == expect, f"{command}: {done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *arguments: str, expect: int | None = 0) -> str:
        done = self.run("dvc", *arguments, expect=expect)
        return done.stdout + done.stderr

    def stage(self, stage: str) -> list[str]:
        """The command of a stage such as "train_baselines resnet18"."""
        return [sys.executable, "-m", *f"pipeline.{stage}".split()]

    def start(self, *command: str) -> subprocess.Popen:
        """Start a command as the leader of a process group, so that it can be killed with its children."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **self.options, **pipes, start_new_session=True)

    def set(self, **parameters: Any) -> None:
        """Change params.yaml; a block's key is written with two underscores, as in `kd__temperature`."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load(path.read_text())
        for name, value in parameters.items():
            *blocks, key = name.split("__")
            functools.reduce(operator.getitem, blocks, content)[key] = value
        path.write_text(yaml.safe_dump(content))

    def queued(self) -> dict[str, str]:
        """Wait until DVC's queue has nothing to do; then the state of each experiment in it by name."""

        def idle() -> dict[str, str] | None:
            time.sleep(1)
            states = dict(re.findall(r"(?m)^[0-9a-f]{7} +(\S+) .* (\w+) *$", self.dvc("queue", "status")))
            return states if states and not {"Queued", "Running"} & {*states.values()} else None

        return wait_until(idle, 600)

    def mlflow_runs(self, uri: str | None = None) -> list[Run]:
        """The runs of a store, by default of the checkout's own."""
        client = MlflowClient(uri or f"sqlite:///{self.folder}/mlflow.db")
        experiments = [named for named in client.search_experiments() if self.experiment in (None, named.name)]
        return client.search_runs([experiment.experiment_id for experiment in experiments]) if experiments else []

    def by_name(self, uri: str | None = None) -> Counter[str]:
        return Counter(run.info.run_name for run in self.mlflow_runs(uri))

    def unsound_runs(self, names: Iterable[str], epochs: int, uri: str | None = None) -> int:
        """How many trainings' runs are missing, more than `names` says, or incomplete in a store."""
        wanted, runs = Counter(names), [run for run in self.mlflow_runs(uri) if "/seed" in run.info.run_name]
        client = MlflowClient(uri or f"sqlite:///{self.folder}/mlflow.db")
        sound = Counter(run.info.run_name for run in runs if complete(client, run, epochs))
        named = Counter(run.info.run_name for run in runs if run.info.run_name in wanted)
        return (wanted - sound).total() + (named - wanted).total()


def copy_checkout(folder: Path, **parameters: Any) -> Checkout:
    """A copy of the project as it lies here, without results, with these parameters (as in Checkout.set)."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if (ROOT / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    checkout = Checkout(folder)
    checkout.set(**parameters)
    identity = ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]  # the machine may have none
    for command in (["init", "-q"], *identity, ["add", "-A"], ["commit", "-qm", "as it is"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return checkout


def checksums(folder: Path) -> dict[str, str]:
    """The MD5 of every file in a folder, by its path there."""
    return {str(path.relative_to(folder)): md5(path) for path in folder.rglob("*") if path.is_file()}


def complete(client: MlflowClient, run: Run, epochs: int) -> bool:
    """Whether a training's run is finished, names its checkpoint, and has every point of its curves once."""
    curves = [client.get_metric_history(run.info.run_id, curve) for curve in CURVES]
    points = [sorted(point.step for point in curve) for curve in curves]
    once = points == [list(range(1, epochs + 1))] * len(CURVES)
    return once and run.info.status == "FINISHED" and "checkpoint_md5" in run.data.tags


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until a server that was just started answers on 127.0.0.1."""

    def answers() -> bool:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    wait_until(answers, 120)


def wait_until(seen: Callable[[], Any], seconds: float = 300) -> Any:
    """What `seen` returns, once it is something. Raises TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := seen():
            return answer
        time.sleep(0.05)
    raise TimeoutError(f"{seconds} s, and not yet")
