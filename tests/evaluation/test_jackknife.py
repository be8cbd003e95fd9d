import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.evaluation.jackknife import FIGURES
from pipeline.evaluation.metrics import score


def expected(name: str, labels: np.ndarray, probabilities: np.ndarray) -> float:
    """A figure by scikit-learn; the calibration error by a plain loop over its bins."""
    named, present = probabilities.argmax(axis=1), np.unique(labels)
    match name:
        case "accuracy":
            return sk.accuracy_score(labels, named)
        case "balanced_accuracy":
            return sk.recall_score(labels, named, average="macro", labels=present)
        case "auc":
            positive = [1] if probabilities.shape[1] == 2 else present
            return np.mean([sk.roc_auc_score(labels == label, probabilities[:, label]) for label in positive])
        case "nll":
            return sk.log_loss(labels, probabilities, labels=range(probabilities.shape[1]))
    confidence, hits = probabilities.max(axis=1), named == labels
    inside = [(number / 15 < confidence) & (confidence <= (number + 1) / 15) for number in range(15)]
    return sum(abs(hits[bin].mean() - confidence[bin].mean()) * bin.mean() for bin in inside if bin.any())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_without_each_image_is_that_of_the_others(name: str, classes: int):
    random = np.random.default_rng(classes)
    labels = random.permutation(np.arange(60) % classes)
    if classes > 2:
        labels[labels == 4], labels[7] = 0, 4  # a class of one image
    probabilities = random.dirichlet(np.ones(classes), 60).round(1) + 0.01  # with ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    value, without = FIGURES[name](labels, probabilities)
    assert value == score(labels, probabilities)[name] == pytest.approx(expected(name, labels, probabilities), abs=1e-12)
    of_others = [expected(name, np.delete(labels, row), np.delete(probabilities, row, axis=0)) for row in range(60)]
    np.testing.assert_allclose(without, of_others, atol=1e-12)
