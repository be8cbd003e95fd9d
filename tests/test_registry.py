"""Registering, promoting and serving the student, with the real MLflow."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from faults.checkout import free_port, wait_for
from pipeline.networks.checkpoints import new_classifier
from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_export import export_onnx, predict_onnx
from pipeline.core.errors import UserError
from pipeline.serving.registry import NAME, Candidate, by_alias, promote, register
from pipeline.tracking.mirror import Tracker
from tests.conftest import ROOT


class Registry:
    """A store of its own, and candidates of a wanted accuracy."""

    def __init__(self, folder: Path, data: TrainingData) -> None:
        self.folder = folder
        self.data = data
        self.tracker = Tracker("e")
        self.client = self.tracker.store.client
        self.onnx = folder / "student.onnx"
        classifier = new_classifier("compact_cnn", {"width": 4, "hidden": 8}, data.dataset, 0).eval()
        export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, self.onnx)

    def candidate(self, name: str, accuracy: float, **changed: object) -> Candidate:
        labels = np.zeros(2000, dtype=np.int64)
        random = np.random.default_rng(0)  # the same images are hard for every candidate
        said = (random.random((5, 2000)) > accuracy).astype(np.int16)
        predictions = self.folder / name / "distillation.npz"
        predictions.parent.mkdir()
        np.savez_compressed(predictions, labels=labels, seeds=np.arange(5), student_distilled=said)
        with self.tracker.training("student_distilled", 0, self.data.dataset, {}, {"device": "cpu"}) as run:
            run.log_checkpoint(name, 1, 1.0)
        return Candidate(
            self.onnx, name, self.data.dataset, predictions, self.tracker.store.run_of(name), accuracy
        )._replace(**changed)

    def aliases(self) -> dict[str, str]:
        return {alias: str(version) for alias, version in self.client.get_registered_model(NAME).aliases.items()}


@pytest.fixture
def registry(tmp_path: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(tmp_path, data)


def test_only_a_better_student_takes_the_champions_place(registry: Registry):
    assert register(registry.client, registry.candidate("first", 0.90))[:2] == ("1", "champion")
    equal = register(registry.client, registry.candidate("equal", 0.901))
    assert equal[:2] == ("2", "challenger")
    assert "not distinguishable from version 1" in equal.reason
    better = register(registry.client, registry.candidate("better", 0.97))
    assert better[:2] == ("3", "champion")
    assert re.match(r"better than version 1: \+[67]\.\d+ points", better.reason)
    worse = register(registry.client, registry.candidate("worse", 0.90))
    assert (worse.alias, worse.reason.split()[0]) == ("challenger", "worse")
    assert registry.aliases() == {"champion": "3", "challenger": "4"}
    again = register(registry.client, registry.candidate("better-again", 0.97, checkpoint_md5="better"))
    assert again == ("3", "champion", "registered before")
    promote(registry.client, "2")
    assert registry.aliases()["champion"] == "2"
    with pytest.raises(UserError, match="no version '9'"):
        promote(registry.client, "9")


def test_what_cannot_be_compared_is_a_challenger(registry: Registry, data: TrainingData):
    register(registry.client, registry.candidate("first", 0.5))
    other = data.dataset.model_copy(update={"fingerprint": "1" * 64})
    found = register(registry.client, registry.candidate("other-data", 0.99, dataset=other))
    assert found.alias == "challenger"
    assert "other data" in found.reason
    candidate = registry.candidate("other-seeds", 0.99)
    said = dict(np.load(candidate.predictions))
    np.savez_compressed(candidate.predictions, **said | {"seeds": np.arange(5) + 10})
    found = register(registry.client, candidate)
    assert found.alias == "challenger"
    assert "no seed in common" in found.reason


def test_a_version_says_what_it_needs_and_where_it_is_from(registry: Registry, data: TrainingData):
    candidate = registry.candidate("first", 0.9)
    before = registry.client.get_run(candidate.run_id).info
    register(registry.client, candidate)
    after = registry.client.get_run(candidate.run_id).info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    version = by_alias(registry.client, "champion")
    assert version.run_id == candidate.run_id
    assert version.tags["checkpoint_md5"] == "first"
    assert version.tags["fingerprint"] == data.dataset.fingerprint
    uri = registry.client.get_model_version_download_uri(NAME, version.version)
    files = {path.name for path in (registry.folder / "mlartifacts").rglob("*")}
    assert {"MLmodel", "requirements.txt", "serving_input_example.json", "student.onnx"} <= files, uri
    (needs,) = (registry.folder / "mlartifacts").rglob("requirements.txt")
    assert all("==" in line for line in needs.read_text().split())
    assert "torch" not in needs.read_text()


@pytest.fixture
def server(registry: Registry) -> Iterator[int]:
    """The champion on a free port of 127.0.0.1."""
    register(registry.client, registry.candidate("first", 0.9))
    port = free_port()
    environment = os.environ | {"PORT": str(port), "MLFLOW_TRACKING_URI": f"sqlite:///{registry.folder}/mlflow.db"}
    (registry.folder / "params.yaml").write_text(
        re.sub(r"experiment: .*", "experiment: e", (ROOT / "params.yaml").read_text())
    )
    command = [sys.executable, "-m", "pipeline.serving.server"]
    environment["PYTHONPATH"] = str(ROOT)
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


def test_the_server_gives_the_models_answers_refuses_bad_bodies_and_lives_on(
    server: int, registry: Registry, data: TrainingData
):
    images = data.val.images[:100].numpy()
    expected = predict_onnx(registry.onnx, images)
    status, answer = post(server, body_of(images))
    rows = json.loads(answer)["predictions"]
    assert status == 200
    assert [row["class"] for row in rows] == [data.dataset.classes[number] for number in expected.argmax(1)]
    found = [[row["probabilities"][name] for name in data.dataset.classes] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)
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
    one = body_of(images[:1])
    with ThreadPoolExecutor(8) as clients:
        statuses = Counter(clients.map(lambda _: post(server, one)[0], range(1000)))
    assert statuses == {200: 1000}


def test_without_a_champion_the_server_says_what_to_do(registry: Registry):
    (registry.folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    command = [sys.executable, "-m", "pipeline.serving.server"]
    done = subprocess.run(
        command,
        cwd=registry.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "make register" in done.stderr.splitlines()[-1]
