"""Made-up results of the track distillation."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pipeline.evaluation.comparisons import Evaluation
from pipeline.evaluation.metrics import by_class, fidelity, over_seeds, score
from pipeline.evaluation.statistics import compare
from pipeline.params import TRACKS

ACCURACY = {"teacher": 0.97, "student_distilled": 0.93, "student_alone": 0.85}
SEEDS, IMAGES = (0, 1, 2), 2000


def results(classes: Sequence[str] = ("cat", "dog"), name: str = "pets") -> Evaluation:
    random = np.random.default_rng(0)
    labels = random.integers(len(classes), size=IMAGES)
    probabilities = {}
    for model, accuracy in ACCURACY.items():
        wrong = random.random((len(SEEDS), IMAGES)) > accuracy
        predicted = (labels + wrong) % len(classes)
        probabilities[model] = (0.8 * np.eye(len(classes)) + 0.2 / len(classes))[predicted].astype(np.float32)
    correct = {model: values.argmax(axis=2) == labels for model, values in probabilities.items()}
    figures = {
        model: [
            score(labels, values) | fidelity(values, teacher)
            for values, teacher in zip(by_seed, probabilities["teacher"], strict=True)
        ]
        for model, by_seed in probabilities.items()
    }
    dataset = {"name": name, "classes": list(classes), "image_shape": [8, 8, 1], "validation": "official"}
    dataset |= {"images": {"train": 1, "val": 2, "test": IMAGES}, "fingerprint": "abc"}
    epoch = {"train_loss": 2.0, "train_accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.6, "terms": {}}
    entry = {"parameters": {"a": 1}, "seeds": SEEDS, "best_epochs": [1, 2, 2], "at_chance": [], "histories": [[epoch] * 2] * 3}
    models = {
        model: entry
        | {"figures": figures[model]}
        | {"by_class": {key: over_seeds([by_class(labels, values, classes)[key] for values in by_seed]) for key in classes}}
        for model, by_seed in probabilities.items()
    }
    return Evaluation(
        metrics={m: over_seeds([f | {"final_train_loss": 2.0} for f in figures[m]]) | {"parameters": 1000} for m in figures},
        comparisons={f"{a}_vs_{b}": compare(correct[a], correct[b]).as_json() for a, b in TRACKS["distillation"].comparisons},
        detail={"track": "distillation", "dataset": dataset, "models": models},
        labels=labels,
        probabilities=probabilities,
    )


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    return results()


@pytest.fixture(scope="session")
def evaluation_of() -> Callable[..., Evaluation]:
    return results


@pytest.fixture
def costs() -> dict:
    cost = {"file_bytes": 4000, "latency_ms": 0.1, "latency_p95_ms": 0.2, "images_per_second": 1e5}
    return {
        "models": {name: cost | {"parameters": 1000} for name in ACCURACY} | {"student": cost, "student_int8": cost},
        "machine": {"processor": "p", "cores": 2, "python": "3", "torch": "2"},
        "commit": "c0ffee",
        "code_is_committed": True,
    }


@pytest.fixture
def exported() -> dict:
    return {
        "pytorch": {"accuracy": 0.93},
        "student": {"accuracy": 0.93, "largest_difference": 1e-6, "same_predictions": 1.0},
        "student_int8": {"accuracy": 0.929, "largest_difference": 0.01, "same_predictions": 0.999},
    }
