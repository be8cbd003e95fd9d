import numpy as np
import pytest
from medmnist.evaluator import getACC, getAUC
from scipy.stats import entropy
from sklearn.metrics import log_loss, roc_auc_score

from pipeline.evaluation.metrics import by_class, confusion, fidelity, over_seeds, report, score


def predictions(classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(classes)
    labels = random.integers(classes, size=500)
    probabilities = random.dirichlet(np.ones(classes), size=500)
    probabilities[np.arange(500), labels] += 0.1
    return labels, probabilities / probabilities.sum(1, keepdims=True)


@pytest.mark.parametrize(("classes", "task"), [(2, "binary-class"), (5, "ordinal-regression"), (9, "multi-class")])
def test_the_figures_are_medmnists_scikit_learns_and_those_of_a_plain_loop(classes: int, task: str):
    labels, probabilities = predictions(classes)
    probabilities[:2] = np.eye(classes)[labels[0]], np.full(classes, 1 / classes)  # certain, undecided
    hits = [(max(row), np.argmax(row) == label) for label, row in zip(labels, probabilities, strict=True)]
    bins = [[hit for hit in hits if number / 15 < hit[0] <= (number + 1) / 15] for number in range(15)]
    gaps = [len(inside) / len(hits) * abs(np.subtract(*np.mean(inside, axis=0))) for inside in bins if inside]
    figures = score(labels, probabilities)
    assert figures["accuracy"] == pytest.approx(getACC(labels[:, None], probabilities, task), abs=1e-9)
    assert figures["auc"] == pytest.approx(getAUC(labels[:, None], probabilities, task), abs=1e-9)
    assert figures["nll"] == pytest.approx(log_loss(labels, probabilities, labels=range(classes)), abs=1e-9)
    assert figures["ece"] == pytest.approx(sum(gaps), abs=1e-9)


def test_auc_is_over_the_classes_that_the_labels_hold():
    labels, probabilities = predictions(4)
    keep = labels != 2
    each = [roc_auc_score(labels[keep] == label, probabilities[keep][:, label]) for label in (0, 1, 3)]
    assert score(labels[keep], probabilities[keep])["auc"] == pytest.approx(np.mean(each))


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
