import pytest

from pipeline.data.prepared import TrainingData
from pipeline.evaluation.comparisons import Evaluation
from tests.evaluation.samples import PLAN, evaluate

COST = {"file_bytes": 4000, "latency_ms": 0.1, "latency_p95_ms": 0.2, "images_per_second": 1e5}
COSTS = {
    "models": dict.fromkeys((*PLAN.models, "student.onnx", "student_int8.onnx"), COST),
    "commit": "c0ffee",
    "code_is_committed": True,
}
COSTS["machine"] = {"processor": "p", "cores": 2, "python": "3", "torch": "2"}
RESULT = {"accuracy": 0.929, "largest_difference": 0.01, "same_predictions": 0.999}
EXPORTED = {"pytorch": {"accuracy": 0.93}, "student": RESULT, "student_int8": RESULT}


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory, data: TrainingData) -> Evaluation:
    return evaluate(tmp_path_factory.mktemp("evaluation") / "models", data)
