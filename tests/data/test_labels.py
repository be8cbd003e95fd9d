import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from pipeline.data.labels import UNKNOWN, balanced, hide_unknown, known_labels, only_known, part
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
    labels = torch.cat([data.train.labels, torch.full((50,), UNKNOWN)])  # which never had a label
    known = known_labels(data.train.labels, 0.1, seed=0)
    assert torch.equal(known_labels(labels, 0.1, seed=0), known)
    for share, of_share in ((0.1, set(known.tolist())), (1.0, set(range(400)))):
        rows = only_known(labels, share, seed=0)
        assert len(rows) == 450
        assert set(rows.tolist()) == of_share
    assert only_known(data.train.labels, 1.0, 0) is None


def test_hidden_labels_leave_the_images_alone(data: TrainingData):
    rows = known_labels(data.train.labels, 0.1, seed=0)
    train = hide_unknown(data.train, 0.1, seed=0)
    assert torch.equal(train.images, data.train.images)
    assert torch.equal(train.labels[rows], data.train.labels[rows])
    assert (train.labels == UNKNOWN).sum() == 400 - len(rows)
    assert all(map(torch.equal, data.train, hide_unknown(data.train, 1.0, 0)))


def test_balanced_weights_are_scikit_learns(data: TrainingData):
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] + [UNKNOWN] * 5)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels[:10].numpy())
    torch.testing.assert_close(balanced(labels, 3), torch.from_numpy(expected).float())


def test_a_part_of_a_split_has_the_images_of_its_labels(data: TrainingData):
    few = part(data.val, 0.2, seed=0)
    rows = known_labels(data.val.labels, 0.2, seed=0)
    assert torch.equal(few.images, data.val.images[rows])
    assert torch.equal(few.labels, data.val.labels[rows])
    assert part(data.val, 1.0, 0) is data.val
