import numpy as np
import pytest
from sklearn import metrics as sk

from pipeline.evaluation import metrics
from pipeline.evaluation.jackknife import FIGURES

LITERAL = {
    "accuracy": lambda labels, probabilities: sk.accuracy_score(labels, probabilities.argmax(1)),
    "balanced_accuracy": lambda labels, probabilities: sk.recall_score(
        labels, probabilities.argmax(1), average="macro", labels=np.unique(labels)
    ),
    "auc": lambda labels, probabilities: np.mean(
        [
            sk.roc_auc_score(labels == label, probabilities[:, label])
            for label in ([1] if probabilities.shape[1] == 2 else np.unique(labels))
        ]
    ),
    "nll": lambda labels, probabilities: sk.log_loss(labels, probabilities, labels=range(probabilities.shape[1])),
    "ece": lambda labels, probabilities: expected_calibration_error(labels, probabilities),
}


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
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
    assert value == pytest.approx(LITERAL[name](labels, probabilities), abs=1e-12)
    expected = [LITERAL[name](np.delete(labels, row), np.delete(probabilities, row, axis=0)) for row in range(60)]
    np.testing.assert_allclose(without, expected, atol=1e-12)
    assert metrics.score(labels, probabilities)[name] == pytest.approx(value, abs=1e-12)
