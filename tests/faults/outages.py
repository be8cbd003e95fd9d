"""A tracking server that goes away while a model is trained.

Every outage is one training of a seed of its own, against a real MLflow server behind a proxy. It counts as survived if the
checkpoint has the bytes of an undisturbed training and the server has, after `make sync`, one finished run with every point once.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import Run

from pipeline.core.files import md5
from tests.faults.checkout import SMALL, Checkout, Outcome, complete, copy_checkout, free_port, kill, wait_for
from tests.faults.proxy import FAULTS, Proxy

EPOCHS = 8
STAGE = "train_student_alone"
MODELS = Path("models/distillation/student_alone")


@contextmanager
def mlflow_server(checkout: Checkout) -> Iterator[int]:
    """A tracking server of the checkout's own, artifacts through it; its port."""
    port = free_port()
    store = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    process = checkout.start(*command, stdout=subprocess.DEVNULL)  # a full pipe would stop it
    try:
        wait_for(port, process)
        yield port
    finally:
        kill(process)


def outages(folder: Path, count: int, random_seed: int = 0) -> list[Outcome]:
    """Inject `count` outages of all kinds in turn; one outcome per kind."""
    moments = random.Random(random_seed)
    checkout = copy_checkout(folder, **SMALL, distillation__epochs=EPOCHS, seeds=list(range(count)))
    checkout.run(*checkout.stage("fetch_data distillation"))
    checkout.run(*checkout.stage(STAGE), timeout=1000)
    expected = [_checksum(checkout, seed) for seed in range(count)]
    shutil.rmtree(checkout.folder / ".trainings")
    kinds = [FAULTS[number % len(FAULTS)] for number in range(count)]
    wrong, lost = set(), set()
    with mlflow_server(checkout) as upstream, Proxy(upstream) as server:
        checkout.environment["MLFLOW_TRACKING_URI"] = uri = f"http://127.0.0.1:{server.port}"
        for seed, kind in enumerate(kinds):
            checkout.set(seeds=[seed])
            stage = checkout.start(*checkout.stage(STAGE))
            while stage.poll() is None and not _runs(checkout, f"http://127.0.0.1:{upstream}", seed):
                time.sleep(0.05)  # until the training is in the store: a stage does not start without one
            time.sleep(moments.uniform(0, 1))
            server.begin(kind)
            try:
                stage.wait(timeout=moments.choice([1, 3, 600]))  # seconds that the outage lasts, or until the stage has ended
            except subprocess.TimeoutExpired:
                server.end()
            output, _ = stage.communicate()
            server.end()
            if stage.returncode or _checksum(checkout, seed) != expected[seed]:
                print(output)
                wrong.add(seed)
        checkout.run(*checkout.stage("tracking.sync"))
        for seed in range(count):
            runs = _runs(checkout, uri, seed)
            tags = [run.data.tags.get("checkpoint_md5") for run in runs]
            if tags != [expected[seed]] or not complete(uri, runs[0], EPOCHS):
                lost.add(seed)
    outcomes = []
    for kind in dict.fromkeys(kinds):
        seeds = {seed for seed in range(count) if kinds[seed] == kind}
        counts = len(seeds), len(seeds - lost - wrong), len(seeds & lost), len(seeds & wrong - lost)
        outcomes.append(Outcome(f"tracking server: {kind}", *counts))
    return outcomes


def _runs(checkout: Checkout, uri: str, seed: int) -> list[Run]:
    """The runs of a seed's training."""
    return [run for run in checkout.mlflow_runs(uri) if run.info.run_name == f"{MODELS.name}/seed{seed}"]


def _checksum(checkout: Checkout, seed: int) -> str | None:
    path = checkout.folder / MODELS / f"seed{seed}.safetensors"
    return md5(path) if path.is_file() else None
