"""A tracking server that goes away while a model is trained.

Every outage is one training of a seed of its own, against a real MLflow server behind a proxy. It counts as survived if the
checkpoint has the bytes of a calm training and the server has, in the end, one finished run of it with every point once.
"""

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow.entities import Run

from faults.checkout import SMALL, Checkout, copy_checkout, free_port, kill, sound, wait_for
from faults.kills import epochs_done
from faults.outcome import Outcome
from faults.proxy import FAULTS, proxy
from pipeline.core.files import md5

EPOCHS = 12
STAGE = "train_student_alone"


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
    models = checkout.folder / "models/distillation/student_alone"
    calm = {path.name: md5(path) for path in models.iterdir()}
    kinds = [FAULTS[number % len(FAULTS)] for number in range(count)]
    failed = set()
    with mlflow_server(checkout) as upstream, proxy(upstream) as server:
        checkout.environment["MLFLOW_TRACKING_URI"] = uri = f"http://127.0.0.1:{server.port}"
        for seed, kind in enumerate(kinds):
            checkout.set(seeds=[seed])
            (models / f"seed{seed}.safetensors").unlink()
            stage = checkout.start(*checkout.stage(STAGE))
            while stage.poll() is None and not any(epochs_done(checkout.folder).values()):
                time.sleep(0.01)  # until an epoch is over
            time.sleep(moments.uniform(0, 0.5))
            server.begin(kind)
            lasts = moments.choice([1, 3, 600])  # seconds, or until the stage has ended
            try:
                stage.wait(timeout=lasts)
            except subprocess.TimeoutExpired:
                server.end()
            output, _ = stage.communicate()
            server.end()
            if stage.returncode:
                failed.add(seed)
                print(output)
        checkout.run(*checkout.stage("send_unsent"))
        left = list(checkout.folder.glob(".unsent/*.jsonl"))
        runs = checkout.mlflow_runs(uri)
        lost = {seed for seed in range(count) if not recorded(uri, runs, seed, models)} | failed
    wrong = {
        seed for seed in range(count) if calm.get(f"seed{seed}.safetensors") != _md5(models / f"seed{seed}.safetensors")
    }
    outcomes = []
    for kind in FAULTS:
        seeds = {seed for seed in range(count) if kinds[seed] == kind}
        survived = len(seeds - lost - wrong)
        outcomes.append(
            Outcome(f"tracking server: {kind}", len(seeds), survived, len(seeds & lost), len(seeds & wrong - lost))
        )
    assert not left, f"not sent: {left}"
    return [outcome for outcome in outcomes if outcome.injected]


def recorded(uri: str, runs: list[Run], seed: int, models: Path) -> bool:
    """Whether a training has exactly one run, a sound one, of the checkpoint that lies here."""
    mine = [run for run in runs if run.info.run_name.endswith(f"/seed{seed}")]
    return (
        len(mine) == 1
        and mine[0].data.tags.get("checkpoint_md5") == _md5(models / f"seed{seed}.safetensors")
        and sound(uri, mine[0], EPOCHS)
    )


def _md5(path: Path) -> str | None:
    return md5(path) if path.is_file() else None
