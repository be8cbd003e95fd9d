import pytest
import torch

from pipeline.data.labels import UNKNOWN, hide_unknown, known_labels, only_known
from pipeline.data.prepared import TrainingData


@pytest.mark.parametrize("share", [1e-6, 0.25, 1.0])
def test_known_labels_are_a_share_of_each_class_at_least_one(data: TrainingData, share: float):
    labels = data.train.labels
    rows = known_labels(labels, share, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [max(1, round(share * count)) for count in torch.bincount(labels).tolist()]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_fewer_labels_are_part_of_more_and_another_seed_knows_others(data: TrainingData):
    few, more, others = (
        set(known_labels(data.train.labels, share, seed).tolist()) for share, seed in ((0.1, 3), (0.5, 3), (0.1, 4))
    )
    assert few < more
    assert few != others


def test_only_known_images_are_seen_as_often_as_there_were_images(data: TrainingData):
    rows = only_known(data.train.labels, 0.1, seed=0)
    assert len(rows) == 400
    assert set(rows.tolist()) == set(known_labels(data.train.labels, 0.1, seed=0).tolist())


def test_hidden_labels_leave_the_images_alone(data: TrainingData):
    train = hide_unknown(data, 0.1, seed=0).train
    assert torch.equal(train.images, data.train.images)
    rows = known_labels(data.train.labels, 0.1, seed=0)
    assert torch.equal(train.labels[rows], data.train.labels[rows])
    assert (train.labels == UNKNOWN).sum() == 400 - len(rows)


def test_with_all_labels_nothing_changes(data: TrainingData):
    assert only_known(data.train.labels, 1.0, 0) is None
    assert all(map(torch.equal, data.train, hide_unknown(data, 1.0, 0).train))
