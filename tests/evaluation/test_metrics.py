import numpy as np
import pytest
from medmnist.evaluator import getACC, getAUC
from scipy.stats import entropy
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from pipeline.evaluation.metrics import (
    by_class,
    confusion,
    fidelity,
    operating_points,
    over_seeds,
    report,
    score,
    youden_threshold,
)


def predictions(classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(classes)
    labels = random.integers(classes, size=500)
    probabilities = random.dirichlet(np.ones(classes), size=500)
    probabilities[np.arange(500), labels] += 0.1
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize(("classes", "task"), [(2, "binary-class"), (5, "ordinal-regression"), (9, "multi-class")])
def test_accuracy_and_auc_are_medmnists(classes: int, task: str):
    labels, probabilities = predictions(classes)
    figures = score(labels, probabilities)
    assert figures["accuracy"] == pytest.approx(getACC(labels[:, None], probabilities, task), abs=1e-9)
    assert figures["auc"] == pytest.approx(getAUC(labels[:, None], probabilities, task), abs=1e-9)


def test_means_over_classes_are_over_those_that_the_labels_hold():
    labels, probabilities = predictions(4)
    labels, probabilities = labels[labels != 2], probabilities[labels != 2]
    named, figures = probabilities.argmax(axis=1), score(labels, probabilities)
    for name, figure in (("auc", roc_auc_score), ("average_precision", average_precision_score)):
        assert figures[name] == pytest.approx(np.mean([figure(labels == k, probabilities[:, k]) for k in (0, 1, 3)]))
    assert figures["f1_macro"] == pytest.approx(np.mean([f1_score(labels == k, named == k) for k in (0, 1, 3)]))
    assert "kappa" not in figures


def test_average_precision_of_two_classes_is_the_seconds():
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])  # the second's, from the highest: 1, 1, 0, 0
    assert score(labels, probabilities)["average_precision"] == 1
    assert score(1 - labels, probabilities)["average_precision"] == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_kappa_weighs_errors_by_the_square_of_their_distance():
    labels, named = np.array([0, 0, 1, 1, 2, 3]), np.array([0, 1, 1, 3, 2, 3])
    expected = ((labels[:, None] - named) ** 2).mean()  # if the two were independent
    kappa = score(labels, np.eye(5)[named], ordered=True)["kappa"]
    assert kappa == pytest.approx(1 - ((labels - named) ** 2).mean() / expected)


def test_youdens_threshold_and_the_operating_points_by_hand():
    def of(positive: list[float]) -> np.ndarray:
        return np.stack([1 - np.array(positive), positive], axis=1)

    val_labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    threshold = youden_threshold(val_labels, of([0.1, 0.2, 0.3, 0.7, 0.65, 0.6, 0.75, 0.9]))
    assert threshold == 0.6  # 4/4 + 3/4; from 0.75: 2/4 + 4/4
    points = operating_points(np.array([0, 0, 1, 1, 1]), of([0.55, 0.6, 0.58, 0.9, 0.2]), threshold)
    assert points == pytest.approx(
        {"sensitivity": 2 / 3, "specificity": 0, "sensitivity_youden": 1 / 3, "specificity_youden": 1 / 2}
    )
    assert youden_threshold(np.array([1, 1]), of([0.1, 0.9])) is None
    assert set(operating_points(np.array([0, 1]), of([0.1, 0.9]), None)) == {"sensitivity", "specificity"}
    assert np.isfinite(youden_threshold(np.array([1, 0]), of([0.1, 0.9]))), "of a model that is always wrong"


def test_precision_recall_and_f1_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.eye(3)[[0, 0, 1, 1, 1, 0]]
    figures, total = by_class(labels, probabilities, ["a", "b", "c"]), score(labels, probabilities)
    rows = np.array([[figures[name][key] for key in ("precision", "recall", "f1")] for name in "abc"])
    assert rows == pytest.approx(np.array([(2 / 3, 2 / 3, 2 / 3), (2 / 3, 1, 4 / 5), (0, 0, 0)]))
    assert total["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 4 / 5) / 6)
    assert np.isfinite(total["nll"]), "although a prediction is certain and wrong"
    assert confusion(labels, probabilities).tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert "0.6667" in report(labels, probabilities, ["a", "b", "c"])


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
