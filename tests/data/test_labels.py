import torch

from pipeline.data.labels import UNKNOWN, hide_unknown, known_labels, only_known
from pipeline.data.prepared import TrainingData


def test_known_labels_are_a_share_of_each_class(data: TrainingData):
    labels = data.train.labels
    known = known_labels(labels, 0.25, seed=0)
    of_class = torch.bincount(labels)
    assert torch.bincount(labels[known]).tolist() == [round(0.25 * n) for n in of_class.tolist()]
    assert known.tolist() == sorted(set(known.tolist()))


def test_every_class_keeps_a_label(data: TrainingData):
    assert len(data.train.labels[known_labels(data.train.labels, 1e-6, seed=0)].unique()) == 10


def test_fewer_labels_are_part_of_more_and_another_seed_knows_others(data: TrainingData):
    few, more = (set(known_labels(data.train.labels, share, seed=3).tolist()) for share in (0.1, 0.5))
    assert few < more
    assert few != set(known_labels(data.train.labels, 0.1, seed=4).tolist())


def test_only_known_images_are_seen_as_often_as_there_were_images(data: TrainingData):
    rows = only_known(data.train.labels, 0.1, seed=0)
    assert len(rows) == 400
    assert set(rows.tolist()) == set(known_labels(data.train.labels, 0.1, seed=0).tolist())


def test_hidden_labels_leave_the_images_alone(data: TrainingData):
    train = hide_unknown(data, 0.1, seed=0).train
    assert torch.equal(train.images, data.train.images)
    known = known_labels(data.train.labels, 0.1, seed=0)
    assert torch.equal(train.labels[known], data.train.labels[known])
    assert (train.labels == UNKNOWN).sum() == 400 - len(known)


def test_with_all_labels_nothing_changes(data: TrainingData):
    assert only_known(data.train.labels, 1.0, 0) is None
    for before, after in zip(data.train, hide_unknown(data, 1.0, 0).train, strict=True):
        assert torch.equal(before, after)
