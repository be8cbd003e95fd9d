"""A tracking server that goes away while a model is trained: a real one, behind a proxy.

Every outage is one training, of a seed of its own. Its checkpoint has the bytes of an undisturbed training and the server has,
after `make sync`, one finished run with every point once.
"""

import contextlib
import http.client
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkout import SMALL, Checkout, checksums, complete, copy_checkout, free_port
from tests.faults.conftest import FULL
from tests.serving.conftest import running

pytestmark = pytest.mark.faults
FAULTS = ("refused", "reset", "answer lost", "hanging", "HTTP 500", "slow")
SLOW = 3  # seconds per request
EPOCHS = 8
STAGE = "train_student_alone"


class Proxy(contextlib.AbstractContextManager):
    """An HTTP proxy that passes requests on to the port `upstream` of 127.0.0.1, except while there is a fault."""

    def __init__(self, upstream: int) -> None:
        self.upstream, self.fault = upstream, ""
        self._listen(0)
        self.port = self._server.server_port

    def _listen(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.proxy, self._server.daemon_threads = self, True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.socket.close()

    def begin(self, fault: str) -> None:
        self.fault = fault
        if fault == "refused":
            self._close()

    def end(self) -> None:
        if self.fault == "refused":
            self._listen(self.port)
        self.fault = ""

    def __exit__(self, *_: object) -> None:
        self.end()
        self._close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        proxy: Proxy = self.server.proxy
        fault = proxy.fault
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while fault == "hanging" == proxy.fault:
            time.sleep(0.05)
        if fault in ("refused", "reset", "hanging"):
            return self._reset()
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "HTTP 500":
            return self._answer(500, "text/plain", b"out of order")
        upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers.items()) | {"Connection": "close"})
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "answer lost":  # the request is carried out all the same
            return self._reset()
        return self._answer(answer.status, answer.getheader("Content-Type", "text/plain"), content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any  # noqa: N815 (http.server's names)

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("kind", FAULTS if FULL else FAULTS[:3])
def test_an_outage_does_not_disturb_a_training_and_sync_completes_its_run(tmp_path: Path, outcome, kind: str):
    count, moments, row = 4 if FULL else 1, random.Random(kind), outcome(f"tracking server: {kind}")
    checkout = copy_checkout(tmp_path, **SMALL, distillation__epochs=EPOCHS, seeds=list(range(count)))
    models = checkout.folder / "models/distillation/student_alone"
    checkout.run(*checkout.stage("fetch_data distillation"))
    checkout.run(*checkout.stage(STAGE))
    expected = [checksums(models)[f"seed{seed}.safetensors"] for seed in range(count)]
    shutil.rmtree(models)
    shutil.rmtree(checkout.folder / ".trainings")
    upstream, wrong = free_port(), set()
    store = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts"]
    command = [Path(sys.executable).with_name("mlflow"), "server", "--port", upstream, "--workers", "1", *store]
    with running(upstream, *command, **checkout.options, stdout=subprocess.DEVNULL), Proxy(upstream) as server:
        direct = f"http://127.0.0.1:{upstream}"
        checkout.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.port}"
        for seed in range(count):
            checkout.set(seeds=[seed])
            stage = checkout.start(*checkout.stage(STAGE))
            while stage.poll() is None and not _runs(checkout, direct, seed):
                time.sleep(0.05)  # until the training is in the store: a stage does not start without one
            time.sleep(moments.uniform(0, 1))
            server.begin(kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                stage.wait(timeout=moments.choice([1, 3, 600]))  # seconds that the outage lasts, or until the stage has ended
            server.end()
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
    row.injected, row.wrong, row.lost = count, len(wrong), right.count(False)


def _runs(checkout: Checkout, uri: str, seed: int) -> list:
    return [run for run in checkout.mlflow_runs(uri) if run.info.run_name == f"student_alone/seed{seed}"]
