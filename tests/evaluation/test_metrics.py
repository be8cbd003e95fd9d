from pathlib import Path

import numpy as np
import pytest
from medmnist import Evaluator
from medmnist.evaluator import getACC, getAUC

from pipeline.evaluation.metrics import auc, confusion, f1_by_class, over_seeds, report, score


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
    if (
        classes > 2
    ):  # for two classes medmnist asks whether the last probability exceeds 0.5, which is the same but for ties
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
    expected = np.mean(
        [
            auc((labels[keep] == c).astype(int), np.stack([-p, p], 1))
            for c in (0, 1, 3)
            for p in [probabilities[keep, c]]
        ]
    )
    assert auc(labels[keep], probabilities[keep]) == pytest.approx(expected)


def test_f1_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.eye(3)[[0, 0, 1, 1, 1, 0]]
    by_class = f1_by_class(labels, probabilities, ["a", "b", "c"])
    assert by_class == pytest.approx({"a": 2 / 3, "b": 4 / 5, "c": 0})
    assert score(labels, probabilities)["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 4 / 5) / 6)
    assert confusion(labels, probabilities).tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert "0.6667" in report(labels, probabilities, ["a", "b", "c"])


def test_seeds_are_summed_up_as_mean_and_sample_deviation():
    assert over_seeds([{"accuracy": 0.9}, {"accuracy": 0.8}]) == pytest.approx(
        {"accuracy": 0.85, "accuracy_sd": 0.0707106781}
    )
    assert over_seeds([{"accuracy": 0.9}]) == {"accuracy": 0.9}, "one seed has no spread"
