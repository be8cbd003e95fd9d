import json

import pytest
import torch

from benchmarks import peer, scaling_tables
from benchmarks.bench import ARCHITECTURES, markdown
from pipeline.fetching.sources import read_source
from pipeline.networks.architectures import build
from tests.conftest import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
SCALING = sorted((ROOT / "benchmarks" / "results" / "scaling").glob("*.json"))


@pytest.mark.parametrize("model", list(ARCHITECTURES))
def test_the_peer_trains_networks_of_the_same_size(model: str):
    _, architecture, arguments = ARCHITECTURES[model]
    ours = build(architecture, **arguments, in_channels=1, image_size=(28, 28), num_classes=10)
    theirs = peer.network(model, 1, 10)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("careful", [False, True])
def test_the_peer_learns(careful: bool):
    source = read_source("mnist5k")
    (images, labels), (val_images, val_labels) = source.splits["train"], source.splits["test"]
    train_set = peer.Images(images[:1000], labels[:1000], source.mean, source.std)
    val_set = peer.Images(val_images, val_labels, source.mean, source.std)
    options = {"epochs": 2, "batch_size": 50, "seed": 0, "careful": careful}
    cpu = torch.device("cpu")
    teacher = peer.train("teacher", train_set, val_set, 10, cpu, **options)
    student = peer.train("student_distilled", train_set, val_set, 10, cpu, teacher=teacher.model, **options)
    assert teacher.accuracy > 0.8
    assert student.accuracy > 0.7
    assert len(student.seconds) == 2


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_are_those_of_the_measured_figures(path):
    assert path.with_suffix(".md").read_text() == markdown(json.loads(path.read_text()))


@pytest.mark.parametrize("path", SCALING, ids=lambda path: path.stem)
def test_the_scaling_tables_are_those_of_the_measured_figures(path):
    assert path.with_suffix(".md").read_text() == scaling_tables.markdown(json.loads(path.read_text()))
    assert path.with_suffix(".md").read_text() in (ROOT / "docs" / "scaling.md").read_text()


def test_there_are_results():
    assert RESULTS
    assert SCALING
