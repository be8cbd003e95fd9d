"""A tracking server that goes away while a model is trained: a real one, behind a proxy.

Every outage is one training, of a seed of its own. Its checkpoint has the bytes of an undisturbed training and the server has,
after `make sync`, one finished run with every point once.
"""

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from tests.checkout import Checkout, checksums, free_port
from tests.faults.conftest import EPOCHS, FULL, SEEDS, STUDENTS
from tests.serving.conftest import running

pytestmark = pytest.mark.faults
FAULTS = ("refused", "reset", "answer lost", "hanging", "HTTP 500", "slow")
SLOW = 3  # seconds per request


class Handler(BaseHTTPRequestHandler):
    """Passes a request on, unless the server's `fault` says otherwise; a connection for each."""

    def _any(self) -> None:
        server, fault = self.server, self.server.fault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while fault == "hanging" == server.fault:
            time.sleep(0.05)
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "HTTP 500":
            return self.send_error(500)
        if fault not in ("reset", "hanging"):
            url, headers = server.upstream + self.path, dict(self.headers)
            answer = requests.request(self.command, url, data=body, headers=headers, timeout=60)
        if fault in ("reset", "hanging", "answer lost"):  # the last: the request is carried out all the same
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return os.close(self.connection.detach())
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        return self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 (http.server's names)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def proxy(port: int, upstream: str, fault: str = "") -> Iterator[None]:
    """A proxy of the server with the address `upstream`, on which a fault happens to every request, or none."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.upstream, server.fault = upstream, fault
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield
        server.fault = ""  # what hangs ends
        server.shutdown()


@pytest.fixture(scope="module")
def direct(trained: Checkout) -> Iterator[str]:
    """The address of a tracking server."""
    port = free_port()
    store = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--port", port, "--workers", "1", *store]
    with running(port, *command, **trained.options, stdout=subprocess.DEVNULL):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("kind", FAULTS if FULL else FAULTS[:3])
def test_an_outage_does_not_disturb_a_training_and_sync_completes_its_run(untrained: Checkout, direct: str, outcome, kind: str):
    checkout, port, moments, outcome.fault = untrained, free_port(), random.Random(kind), f"tracking server: {kind}"
    checkout.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    files = {f"student_alone/seed{seed}": f"seed{seed}.safetensors" for seed in (SEEDS if FULL else SEEDS[:1])}
    for seed, (run, file) in enumerate(files.items()):
        checkout.set(seeds=[seed])
        with proxy(port, direct):
            stage = checkout.start(*checkout.stage("train_student_alone"))
            while stage.poll() is None and run not in checkout.by_name(direct):
                time.sleep(0.05)  # until the training is in the store: a stage does not start without one
            time.sleep(moments.uniform(0, 1))
        outage = contextlib.nullcontext() if kind == "refused" else proxy(port, direct, kind)
        with outage, contextlib.suppress(subprocess.TimeoutExpired):
            stage.wait(timeout=moments.choice([1, 3, 600]))  # seconds that it lasts, or until the stage has ended
        with proxy(port, direct):
            output, _ = stage.communicate()
        if stage.returncode or checksums(checkout.folder / STUDENTS).get(file) != checkout.expected[file]:
            print(output)
            outcome.wrong += 1
    checkout.environment["MLFLOW_TRACKING_URI"] = direct
    checkout.run(*checkout.stage("tracking.sync"))
    named = {run.info.run_name: run.data.tags.get("checkpoint_md5") for run in checkout.mlflow_runs(direct)}
    other = sum(named.get(run) != checkout.expected[file] for run, file in files.items())
    outcome.injected, outcome.lost = len(files), max(other, checkout.unsound_runs([*files], EPOCHS, direct))
