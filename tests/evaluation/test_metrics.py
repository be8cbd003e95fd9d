from pathlib import Path

import numpy as np
import pytest
from medmnist import Evaluator
from medmnist.evaluator import getACC, getAUC
from scipy.stats import entropy
from sklearn.metrics import log_loss

from pipeline.evaluation.metrics import (
    auc,
    by_class,
    confusion,
    fidelity,
    negative_log_likelihood,
    over_seeds,
    reliability,
    report,
    score,
)


def predictions(classes: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(classes)
    labels = random.integers(classes, size=count)
    probabilities = random.dirichlet(np.ones(classes), size=count)
    probabilities[np.arange(count), labels] += 0.1
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("classes", "task"), [(2, "binary-class"), (3, "multi-class"), (9, "multi-class"), (5, "ordinal-regression")]
)
def test_accuracy_and_auc_are_medmnists(classes: int, task: str):
    labels, probabilities = predictions(classes)
    figures = score(labels, probabilities)
    assert figures["auc"] == pytest.approx(getAUC(labels[:, None], probabilities, task), abs=1e-9)
    if classes > 2:  # for two, medmnist asks whether the last probability exceeds 0.5, which is the same but for ties
        assert figures["accuracy"] == pytest.approx(getACC(labels[:, None], probabilities, task), abs=1e-9)


def test_the_official_evaluator_agrees_on_the_official_test_split(mirror: Path):
    evaluator = Evaluator("pneumoniamnist", "test", root=str(mirror))
    labels = evaluator.labels.reshape(-1)
    random = np.random.default_rng(0)
    positive = np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    probabilities = np.stack([1 - positive, positive], axis=1)
    theirs = evaluator.evaluate(probabilities)
    ours = score(labels, probabilities)
    assert ours["auc"] == pytest.approx(theirs.AUC, abs=1e-9)
    assert ours["accuracy"] == pytest.approx(theirs.ACC, abs=1e-9)


def test_auc_is_over_the_classes_that_the_labels_hold():
    labels, probabilities = predictions(4)
    keep = labels != 2
    each = [auc((labels[keep] == label).astype(int), probabilities[keep][:, [0, label]]) for label in (0, 1, 3)]
    assert auc(labels[keep], probabilities[keep]) == pytest.approx(np.mean(each))


def test_precision_recall_and_f1_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.eye(3)[[0, 0, 1, 1, 1, 0]]
    figures = by_class(labels, probabilities, ["a", "b", "c"])
    assert figures["a"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert figures["b"] == pytest.approx({"precision": 2 / 3, "recall": 1, "f1": 4 / 5})
    assert figures["c"] == {"precision": 0, "recall": 0, "f1": 0}
    assert score(labels, probabilities)["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 4 / 5) / 6)
    assert confusion(labels, probabilities).tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert "0.6667" in report(labels, probabilities, ["a", "b", "c"])


@pytest.mark.parametrize("classes", [2, 9])
def test_the_likelihood_is_scikit_learns(classes: int):
    labels, probabilities = predictions(classes)
    expected = log_loss(labels, probabilities, labels=range(classes))
    assert score(labels, probabilities)["nll"] == pytest.approx(expected, abs=1e-9)


def test_a_certain_mistake_has_a_finite_likelihood():
    assert np.isfinite(negative_log_likelihood(np.array([1, 0]), np.array([[1.0, 0.0], [1.0, 0.0]])))


@pytest.mark.parametrize("classes", [2, 9])
def test_the_calibration_error_is_that_of_a_plain_loop(classes: int):
    labels, probabilities = predictions(classes)
    expected = 0.0
    for number in range(15):
        inside = []
        for label, row in zip(labels, probabilities, strict=True):
            if number / 15 < max(row) <= (number + 1) / 15:
                inside.append((max(row), float(np.argmax(row) == label)))
        if inside:
            confidence, accuracy = np.mean(inside, axis=0)
            expected += len(inside) / len(labels) * abs(confidence - accuracy)
    assert score(labels, probabilities)["ece"] == pytest.approx(expected, abs=1e-9)


def test_every_prediction_is_in_a_bin_of_the_reliability_diagram():
    labels = np.array([0, 1])
    bins = reliability(labels, np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert bins["images"].sum() == 2
    assert bins["images"].iloc[-1] == 1
    assert bins["accuracy"].iloc[-1] == 1


def test_fidelity_is_the_share_of_equal_predictions_and_scipys_divergence():
    _, student = predictions(5)
    teacher = np.roll(student, 1, axis=0)
    expected = np.mean(student.argmax(1) == teacher.argmax(1)), np.mean(entropy(teacher, student, axis=1))
    assert tuple(fidelity(student, teacher).values()) == pytest.approx(expected)
    assert tuple(fidelity(student, student).values()) == pytest.approx((1, 0))


def test_seeds_are_summed_up_as_mean_deviation_and_interval():
    summary = over_seeds([{"accuracy": 0.9}, {"accuracy": 0.8}])
    assert summary == pytest.approx({"accuracy": 0.85, "accuracy_sd": 0.0707106781, "accuracy_ci95": 0.6353102368})
    assert over_seeds([{"accuracy": 0.9}]) == {"accuracy": 0.9}, "one seed has no spread"
