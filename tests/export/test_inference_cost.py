from pathlib import Path

from pipeline.data.prepared import TrainingData
from pipeline.export.inference_cost import inference_cost
from pipeline.export.onnx_export import export_onnx
from pipeline.networks.checkpoints import new_classifier


def test_an_exported_student_is_measured_without_pytorch(data: TrainingData, tmp_path: Path):
    classifier = new_classifier("compact_cnn", {"width": 4, "hidden": 8}, data.dataset, 0)
    export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, tmp_path / "student.onnx")
    cost = inference_cost(tmp_path / "student.onnx")
    assert 0 < cost["latency_ms"] <= cost["latency_p95_ms"]
    assert cost["images_per_second"] > 1000 / cost["latency_ms"], "batches are faster"
    assert cost.get("peak_memory_mib", 100) < 150, "PyTorch alone takes more"
