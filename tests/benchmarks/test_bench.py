import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench, peer
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
        train = bench.ours if way == "c" else bench.peers
        teacher, student = (train(way, model, data, 2, tmp_path, CPU, 2) for model in ("teacher", "student_distilled"))
        assert teacher["accuracy"] > 0.8
        assert student["accuracy"] > 0.7
        assert student["wall_seconds"] >= 2 * student["seconds_per_epoch"] > 0
        assert student["peak_memory_mib"] > 100


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_measured_figures(path: Path):
    assert path.with_suffix(".md").read_text() == bench.markdown(json.loads(path.read_text()))


def test_there_are_results():
    assert RESULTS
