from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.data.prepared import TrainingData
from pipeline.evaluation.comparisons import Evaluation
from tests.evaluation.samples import PLAN, evaluate

FILES = ("student", "student_int8", "teacher", "teacher_int8")
COST = {"file_bytes": 4000, "latency_ms": 0.1, "latency_p95_ms": 0.2, "images_per_second": 1e5}
COSTS = {
    "models": dict.fromkeys((*PLAN.models, *(f"{name}.onnx" for name in FILES)), COST),
    "commit": "c0ffee",
    "code_is_committed": True,
}
COSTS["machine"] = {"processor": "p", "cores": 2, "python": "3", "torch": "2"}
RESULT = {"accuracy": 0.929, "auc": 0.987, "balanced_accuracy": 0.9, "nll": 0.2, "ece": 0.02}
CHANGED = RESULT | {"largest_difference": 0.01, "same_predictions": 0.999}
OF_STUDENT = CHANGED | {"temperature": 1.0}
EXPORTED = {"pytorch": RESULT, "student": OF_STUDENT, "student_int8": OF_STUDENT, "teacher": RESULT, "teacher_int8": CHANGED}


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory, data: TrainingData) -> Evaluation:
    return evaluate(tmp_path_factory.mktemp("evaluation") / "models", data)


def changed(
    evaluation: Evaluation,
    comparison: Mapping[str, Any] = {},
    data: Mapping[str, Any] = {},
    parameters: Mapping[str, Any] = {},
    **detail: Any,
) -> Evaluation:
    """The evaluation, of five seeds, changed: each comparison, the data set, each model's parameters, and the detail."""
    models = {
        name: entry | {"parameters": entry["parameters"] | parameters} for name, entry in evaluation.detail["models"].items()
    }
    comparisons = {}
    for name, figures in evaluation.comparisons.items():
        others = {metric: other | {"seeds": 5} for metric, other in figures["others"].items()}
        comparisons[name] = figures | {"seeds": 5, "others": others} | comparison
    whole = evaluation.detail | {"models": models, "dataset": evaluation.detail["dataset"] | data} | detail
    return evaluation._replace(comparisons=comparisons, detail=whole)
