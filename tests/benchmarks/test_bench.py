import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench, peer, stage_overheads
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.architectures import build
from tests.conftest import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("model", list(bench.ARCHITECTURES))
def test_the_peer_trains_networks_of_the_same_size(model: str):
    _, architecture, arguments = bench.ARCHITECTURES[model]
    ours = build(architecture, **arguments, in_channels=1, image_size=(28, 28), num_classes=10)
    theirs = peer.network(model, 1, 10)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.slow
def test_every_way_learns_from_the_same_images(tmp_path: Path):
    prepare(read_source("mnist5k"), 0.1, tmp_path / "distillation")
    data = bench.cut(tmp_path, "distillation", 0.5)
    for way in bench.WAYS:
        train = bench.ours if way in "cd" else bench.peers
        teacher, student = (train(way, model, data, 2, tmp_path, CPU, 2, first=3) for model in ("teacher", "student_distilled"))
        assert [len(epochs) for epochs in student["figures"]] == [bench.SHORT["epochs"] if way == "d" else 2] * 2
        assert np.max(teacher["figures"]) > 0.8
        assert np.max(student["figures"]) > 0.7
        assert np.min(student["seconds"]) > 0
        assert np.sum(student["seconds"]) == pytest.approx(student["wall_seconds"], rel=1 if way in "ab" else 1e-6)
        assert student["peak_memory_mib"] > 100


def test_the_peer_stops_at_its_target():
    images = peer.Images(np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int64), 0.0, 1.0)
    settings = {"classes": 2, "device": CPU, "batch_size": 2, "seed": 0, "careful": False}
    values = iter((0.2, 0.9, 1.0))
    trained = peer.train("student_alone", images, images, epochs=3, figure=lambda *_: next(values), target=0.8, **settings)
    assert trained.figures == [0.2, 0.9]
    assert len(trained.seconds) == 2


def test_the_summary_counts_the_seconds_to_the_target():
    runs = [
        {"seconds": [[2.0, 4.0], [4.0, 6.0]], "figures": [[0.97, 0.99], [0.985, 0.98]], "peak_memory_mib": 5},
        {"seconds": [[3.0, 1.0, 1.0]], "figures": [[0.1, 0.2, 0.3]], "peak_memory_mib": 4},
    ]
    found = bench.summarise("teacher", runs, 30.0, 20.0)
    assert found["seconds_per_epoch"] == [[3.0, 5.0], [3.0, 1.0, 1.0]]
    assert found["seconds_to_target"] == [6.0, 4.0, None]
    assert found["share_of_matmul_rate"] == 30 / 3 / 20
    assert found["figure"] == 0.985


def test_the_stages_are_those_of_the_graph():
    listed = subprocess.check_output([sys.executable, "-m", "dvc", "stage", "list", "--name-only"], cwd=ROOT, text=True)
    named = {stage.replace(" ", "@") for stage in stage_overheads.stages()}
    assert named == set(listed.split())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_measured_figures(path: Path):
    assert path.with_suffix(".md").read_text() == bench.markdown(json.loads(path.read_text()))
