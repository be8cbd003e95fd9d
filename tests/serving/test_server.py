"""Serving the champion, with the real MLflow."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_model import Student
from pipeline.serving.registry import register
from tests.conftest import ROOT
from tests.faults.checkout import free_port, wait_for
from tests.serving.conftest import Registry


@pytest.fixture
def server(registry: Registry) -> Iterator[int]:
    """The champion on a free port of 127.0.0.1."""
    register(registry.client, registry.candidate("first", 0.9))
    port = free_port()
    environment = os.environ | {"PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.serving.server"]
    process = subprocess.Popen(command, cwd=registry.folder, env=environment)
    wait_for(port, process)
    yield port
    process.terminate()
    process.wait(timeout=20)


def post(port: int, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def body_of(images: np.ndarray) -> bytes:
    return json.dumps({"inputs": images.tolist()}).encode()


def test_the_server_gives_the_models_answers_refuses_bad_bodies_and_lives_on(server: int, registry: Registry, data: TrainingData):
    images = data.val.images[:100].numpy()
    expected = Student(registry.onnx).probabilities(images)
    status, answer = post(server, body_of(images))
    rows = json.loads(answer)["predictions"]
    assert status == 200
    assert [row["class"] for row in rows] == [data.dataset.classes[number] for number in expected.argmax(1)]
    served = [[row["probabilities"][name] for name in data.dataset.classes] for row in rows]
    np.testing.assert_allclose(served, expected, atol=1e-6)
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
    }
    answers = {name: post(server, body)[0] for name, body in bad.items()}
    assert {name: status for name, status in answers.items() if not 400 <= status < 500} == {}
    assert answers["huge"] == 413
    image = body_of(images[:1])
    with ThreadPoolExecutor(8) as clients:
        statuses = Counter(clients.map(lambda _: post(server, image)[0], range(1000)))
    assert statuses == {200: 1000}


def test_without_a_champion_the_server_says_what_to_do(registry: Registry):
    command = [sys.executable, "-m", "pipeline.serving.server"]
    done = subprocess.run(
        command, cwd=registry.folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "make register" in done.stderr.splitlines()[-1]
