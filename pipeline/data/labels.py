"""Training with few labels: which labels are known, and what that makes of the training images.

The fewer labels, the fewer images a teacher and a lone student can learn from; a distilled student still sees all of them,
since a teacher answers for any image. An epoch has as many images, and a training as many steps, whatever the share.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import UNKNOWN
from pipeline.data.prepared import Split


def known_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """The numbers of the images whose labels may be used: `share` (0-1) of each class, at least one image, drawn by `seed`.

    int64, ascending. A smaller share is a part of a larger one. An image that never had a label is none of them.
    """
    random, values = np.random.default_rng(seed), labels.cpu().numpy()
    of_classes = [random.permutation(np.flatnonzero(values == label)) for label in np.unique(values[values != UNKNOWN])]
    drawn = [of_class[: max(1, round(share * len(of_class)))] for of_class in of_classes]
    return torch.from_numpy(np.sort(np.concatenate(drawn))).to(labels.device)


def only_known(labels: Tensor, share: float, seed: int) -> Tensor | None:
    """Which images to train on so as to see the labelled ones alone, repeated to as many as there are; None for all of them."""
    if share == 1 and not (labels == UNKNOWN).any():
        return None
    labelled = known_labels(labels, share, seed)
    return labelled[torch.arange(len(labels), device=labelled.device) % len(labelled)]


def hide_unknown(train: Split, share: float, seed: int) -> Split:
    """`train` with all its images, the labels of all but the known ones replaced by UNKNOWN."""
    labelled = known_labels(train.labels, share, seed)
    labels = torch.full_like(train.labels, UNKNOWN)
    labels[labelled] = train.labels[labelled]
    return train._replace(labels=labels)


def part(split: Split, share: float, seed: int) -> Split:
    """The images of `split` whose labels are known, and these; `split` itself for a share of 1, and if it is empty."""
    if share == 1 or not len(split.labels):
        return split
    rows = known_labels(split.labels, share, seed)
    return Split(split.images[rows.to(split.images.device)], split.labels[rows])


def balanced(labels: Tensor, classes: int) -> Tensor:
    """A weight per class, float32 (K,), inversely proportional to its images among the known labels; their mean over them is 1.

    As scikit-learn's "balanced": N / (K * N_k).
    """
    counts = labels[labels != UNKNOWN].bincount(minlength=classes)
    return counts.sum() / (classes * counts.clamp(min=1).float())
