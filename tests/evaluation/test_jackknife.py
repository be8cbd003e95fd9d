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
    "auc": metrics.auc,
    "nll": lambda labels, probabilities: metrics.score(labels, probabilities)["nll"],
    "ece": lambda labels, probabilities: metrics.score(labels, probabilities)["ece"],
}


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
