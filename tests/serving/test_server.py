"""Serving the champion, with the real MLflow."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import uvicorn
from starlette.applications import Starlette

from pipeline.export.onnx_model import Student
from pipeline.serving import server
from tests.checkout import free_port
from tests.conftest import ROOT
from tests.serving.conftest import Registry, running

COMMAND = [sys.executable, "-m", "pipeline.serving.server"]


def post(port: int, body: bytes) -> requests.Response:
    json_type = {"Content-Type": "application/json"}
    return requests.post(f"http://127.0.0.1:{port}/invocations", body, headers=json_type, timeout=60)


def body_of(images: np.ndarray) -> bytes:
    return json.dumps({"inputs": images.tolist()}).encode()


def test_the_server_gives_the_models_answers_refuses_bad_bodies_and_lives_on(registry: Registry):
    registry.register("first", 0.9)
    images, classes = registry.data.val.images[:100].numpy(), registry.data.dataset.classes
    expected = Student(registry.onnx).probabilities(images)
    bad = {
        "empty": b"",
        "torn": body_of(images)[:-20],
        "bytes": bytes(range(256)),
        "huge": b"1" * (33 * 2**20),
        "deep": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "long number": b'{"inputs": [' + b"9" * 5000 + b"]}",
        "no images": body_of(images[:0]),
        "other shape": body_of(images[:, :4]),
        "flat": body_of(images.reshape(100, -1)),
        "negative": body_of(images.astype(int) - 1),
        "too bright": body_of(images.astype(int) + 1),
        "scaled": body_of(images / 255),
        "text": b'{"inputs": "a cat"}',
        "no inputs": b"{}",
        "null": b'{"inputs": null}',
        "booleans": body_of(images > 300),
        "digits in quotes": body_of(images.astype(str)),
        "two keys": body_of(images[:1])[:-1] + b', "inputs": [1]}',
    }
    port = free_port()
    with running(port, *COMMAND, cwd=registry.folder, env=os.environ | {"PORT": str(port), "PYTHONPATH": str(ROOT)}):
        answer = post(port, body_of(images))
        assert answer.status_code == 200
        rows = answer.json()["predictions"]
        assert [row["class"] for row in rows] == [classes[number] for number in expected.argmax(1)]
        np.testing.assert_allclose([[row["probabilities"][name] for name in classes] for row in rows], expected, atol=1e-6)
        statuses = {name: post(port, body).status_code for name, body in bad.items()}
        assert {name: status for name, status in statuses.items() if not 400 <= status < 500} == {}
        assert statuses["huge"] == 413
        elsewhere = requests.get(f"http://127.0.0.1:{port}/ping", headers={"Host": "evil.example"}, timeout=60)
        assert elsewhere.status_code == 400
        with ThreadPoolExecutor(8) as clients:
            answers = clients.map(lambda _: post(port, body_of(images[:1])).status_code, range(200))
            assert Counter(answers) == {200: 200}


def test_without_a_champion_the_server_says_what_to_do(registry: Registry):
    options = {"cwd": registry.folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    done = subprocess.run(COMMAND, **options, check=False)
    assert done.returncode == 1
    assert "make register" in done.stderr.splitlines()[-1]


async def post_in_parts(app: Starlette, messages: Iterable[dict], then: float = 0) -> int:
    """The status that a request gets whose body comes in these messages, and then nothing for so many seconds."""
    waiting, sent = iter(messages), []

    async def receive() -> dict:
        if message := next(waiting, None):
            return message
        await asyncio.sleep(then)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    await app({"type": "http", "method": "POST", "path": "/invocations", "headers": []}, receive, send)
    return sent[0]["status"]


def test_a_body_in_any_number_of_parts_is_read_and_one_that_does_not_come_or_end_given_up(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog
):
    app, part = server.application(Student(registry.onnx)), {"type": "http.request", "body": b" " * 2**20, "more_body": True}
    start, spaces = time.process_time(), ({**part, "body": b" ", "more_body": left > 0} for left in reversed(range(2_000_000)))
    assert asyncio.run(post_in_parts(app, spaces)) == 400, "no JSON"
    assert next(spaces, None) is None, "read whole"
    assert time.process_time() - start < 20
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    assert asyncio.run(post_in_parts(app, [part], then=60)) == 408
    assert asyncio.run(post_in_parts(app, [part] * 9, then=60)) == 413
    assert asyncio.run(post_in_parts(app, [part])) == 400, "the client has gone"
    assert "Traceback" not in caplog.text


def test_a_connection_on_which_nothing_is_going_on_is_closed(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)  # of every connection
    config = uvicorn.Config(server.application(Student(registry.onnx)), http=server.Protocol, log_level="warning")
    running_server = uvicorn.Server(config)
    thread = threading.Thread(target=running_server.run, args=([listening],))
    thread.start()
    try:
        for begun in (b"", b"GET /ping HTTP/1.1\r\nHos"):
            with socket.create_connection(listening.getsockname(), timeout=30) as connection:
                connection.sendall(begun)
                assert connection.recv(1000) == b"", "closed"
        with socket.socket() as reads_nothing:
            reads_nothing.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            reads_nothing.connect(listening.getsockname())
            reads_nothing.settimeout(30)
            with pytest.raises(ConnectionError):
                reads_nothing.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200_000)
    finally:
        running_server.should_exit = True
        thread.join()
