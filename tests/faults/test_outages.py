"""A tracking server that goes away while a model is trained: a real one, behind a proxy.

Every outage is one training, of a seed of its own. Its checkpoint has the bytes of an undisturbed training and the server has,
after `make sync`, one finished run with every point once.
"""

import contextlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from tests.checkout import SMALL, Checkout, checksums, complete, copy_checkout, free_port
from tests.faults.conftest import FULL
from tests.serving.conftest import running

pytestmark = pytest.mark.faults
FAULTS = ("refused", "reset", "answer lost", "hanging", "HTTP 500", "slow")
SLOW = 3  # seconds per request
EPOCHS = 8
STAGE = "train_student_alone"


class Handler(BaseHTTPRequestHandler):
    """Passes a request on to the address `upstream`, unless the server's `fault` says otherwise; a connection for each."""

    def _any(self) -> None:
        server, fault = self.server, self.server.fault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while fault == "hanging" == server.fault:
            time.sleep(0.05)
        if fault in ("reset", "hanging"):
            return self._reset()
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "HTTP 500":
            return self.send_error(500)
        answer = requests.request(self.command, server.upstream + self.path, data=body, headers=dict(self.headers), timeout=60)
        if fault == "answer lost":  # the request is carried out all the same
            return self._reset()
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        return self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 (http.server's names)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def proxy(port: int, upstream: str) -> Iterator[ThreadingHTTPServer]:
    """A proxy of the server with the address `upstream`; its attribute `fault` says what goes wrong."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.upstream, server.fault = upstream, ""
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("kind", FAULTS if FULL else FAULTS[:3])
def test_an_outage_does_not_disturb_a_training_and_sync_completes_its_run(tmp_path: Path, outcome, kind: str):
    count, moments, outcome.fault = 4 if FULL else 1, random.Random(kind), f"tracking server: {kind}"
    checkout = copy_checkout(tmp_path, **SMALL, distillation__epochs=EPOCHS, seeds=list(range(count)))
    models = checkout.folder / "models/distillation/student_alone"
    for stage in ("fetch_data distillation", STAGE):
        checkout.run(*checkout.stage(stage))
    expected = [checksums(models)[f"seed{seed}.safetensors"] for seed in range(count)]
    for folder in (models, checkout.folder / ".trainings"):
        shutil.rmtree(folder)
    (port, upstream), wrong = (free_port(), free_port()), set()
    direct = f"http://127.0.0.1:{upstream}"
    store = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"]
    command = [Path(sys.executable).with_name("mlflow"), "server", "--port", upstream, "--workers", "1", *store]
    with contextlib.ExitStack() as servers, running(upstream, *command, **checkout.options, stdout=subprocess.DEVNULL):
        server = servers.enter_context(proxy(port, direct))
        checkout.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        for seed in range(count):
            checkout.set(seeds=[seed])
            stage = checkout.start(*checkout.stage(STAGE))
            while stage.poll() is None and not _runs(checkout, direct, seed):
                time.sleep(0.05)  # until the training is in the store: a stage does not start without one
            time.sleep(moments.uniform(0, 1))
            server.fault = kind
            if kind == "refused":
                servers.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                stage.wait(timeout=moments.choice([1, 3, 600]))  # seconds that the outage lasts, or until the stage has ended
            if kind == "refused":
                server = servers.enter_context(proxy(port, direct))
            server.fault = ""
            output, _ = stage.communicate()
            if stage.returncode or checksums(models).get(f"seed{seed}.safetensors") != expected[seed]:
                print(output)
                wrong.add(seed)
        checkout.run(*checkout.stage("tracking.sync"))
        runs = {seed: _runs(checkout, direct, seed) for seed in set(range(count)) - wrong}
        right = [
            [run.data.tags.get("checkpoint_md5") for run in of_seed] == [expected[seed]] and complete(direct, of_seed[0], EPOCHS)
            for seed, of_seed in runs.items()
        ]
    outcome.injected, outcome.wrong, outcome.lost = count, len(wrong), right.count(False)


def _runs(checkout: Checkout, uri: str, seed: int) -> list:
    return [run for run in checkout.mlflow_runs(uri) if run.info.run_name == f"student_alone/seed{seed}"]
