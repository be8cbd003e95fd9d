import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

from pipeline import evaluate_export, export_student
from pipeline.core.files import md5, read_json
from pipeline.data.prepared import EvaluationData, Split, TrainingData
from pipeline.export.onnx_export import export_onnx
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint, new_classifier, save_checkpoint
from pipeline.networks.inference import predict
from tests.checkout import ROOT
from tests.evaluation.samples import with_validation
from tests.networks.conftest import ARGUMENTS, describe


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, to work in; where its models are exported to."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path("models/exported/distillation")


@pytest.mark.parametrize(("wanted", "validation"), [(0.5, 100), (1.01, 100), (0.5, 0)])
def test_int8_stays_if_it_names_the_same_classes_often_enough(
    checkout: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch, capsys, wanted: float, validation: int
):
    traits, rule = ({"resize": "pad"}, "pad") if validation else ({"name": "pneumoniamnist"}, "crop")
    data = with_validation(data._replace(dataset=data.dataset.model_copy(update=traits)), validation)
    classifier, likeliest = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 0), 1
    if validation:  # of which the untrained student knows two thirds
        logits = predict(classifier, data.val.images)
        labels = torch.where(torch.arange(validation) % 3 == 0, data.val.labels, logits.argmax(dim=1))
        data = data._replace(val=Split(data.val.images, labels))
        likeliest = minimize_scalar(lambda t: cross_entropy(logits / t, labels).item(), bounds=(0.01, 1)).x
    monkeypatch.setattr(export_student, "load_training_data", lambda *_: data)
    monkeypatch.setattr(export_student, "AGREEMENT", wanted)
    for model in ("student_distilled", "teacher"):
        save_checkpoint(Path(f"models/distillation/{model}/seed0.safetensors"), classifier, describe(data.dataset))
    export_student.main("distillation")
    choice, student = read_json(checkout / "choice.json"), Student(checkout / "student.onnx")
    assert (choice["validation_accuracy"] is None) == (validation == 0)
    assert 0.5 < choice["int8_agreement"] <= 1
    assert choice["int8_kept"] == (checkout / "student_int8.onnx").exists() == (wanted < 1)
    assert (student.resize, student.temperature) == (rule, choice["temperature"])
    assert student.temperature == pytest.approx(likeliest, rel=1e-3)
    assert ("not kept" in capsys.readouterr().out) == (wanted > 1)


@pytest.fixture
def trained(checkout: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a track's models are exported to: an untrained student, whose int8 version does not stay, and two teachers."""
    monkeypatch.setattr(export_student, "load_training_data", lambda *_: data)
    monkeypatch.setattr(export_student, "AGREEMENT", 1.01)
    monkeypatch.setattr(evaluate_export, "load_evaluation_data", lambda *_: EvaluationData(data.dataset, data.val, data.val))
    description = describe(data.dataset)
    better = [description.history[0].model_copy(update={"val_accuracy": 0.9})]
    checkpoints = {"student_distilled/seed0": description, "teacher/seed0": description}
    checkpoints["teacher/seed1"] = description.model_copy(update={"history": better, "seed": 1})
    for number, (name, described) in enumerate(checkpoints.items()):
        classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, number)
        save_checkpoint(Path(f"models/distillation/{name}.safetensors"), classifier, described)
    return checkout


def measured() -> dict:
    evaluate_export.main("distillation")
    return read_json(Path("metrics/distillation_export.json"))


def test_the_best_teacher_lies_beside_the_student_and_its_agreement_is_reported(trained: Path, data: TrainingData):
    export_student.main("distillation")
    best = Path("models/distillation/teacher/seed1.safetensors")
    assert read_json(trained / "choice.json")["teacher"] == {"checkpoint": best.name, "checkpoint_md5": md5(best), "seed": 1}
    images, labels = data.val.images, data.val.labels.numpy()
    expected = predict(load_checkpoint(best, torch.device("cpu"))[0], images).softmax(dim=1).numpy()
    float32, int8 = (Student(trained / f"{name}.onnx").probabilities(images.numpy()) for name in ("teacher", "teacher_int8"))
    assert float32 == pytest.approx(expected, abs=1e-6)
    results = measured()
    assert list(results) == ["pytorch", "student", "teacher", "teacher_int8"]
    for name, probabilities in (("teacher", float32), ("teacher_int8", int8)):
        assert results[name]["accuracy"] == (probabilities.argmax(1) == labels).mean()
        assert results[name]["auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-6)
    assert results["teacher_int8"]["same_predictions"] == (float32.argmax(1) == int8.argmax(1)).mean()
    assert results["teacher_int8"]["largest_difference"] == pytest.approx(np.abs(float32 - int8).max()) != 0
    assert results["pytorch"]["auc"] == pytest.approx(results["student"]["auc"], abs=0.01)


def refuse_teacher(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def export(classifier, shape, classes, path: Path, *facts: object) -> None:
        if path.name == "teacher.onnx":
            raise error
        export_onnx(classifier, shape, classes, path, *facts)

    monkeypatch.setattr(export_student, "export_onnx", export)


@pytest.mark.parametrize("outside", [True, False])
def test_a_teacher_without_a_file_is_a_reason_in_a_line(trained: Path, monkeypatch: pytest.MonkeyPatch, outside: bool):
    if outside:
        shutil.rmtree("models/distillation/teacher")
        Path("models/distillation/teacher").mkdir()
        Path("models/distillation/teacher/seed0.npz").touch()
        reason = "a teacher from outside is a file of what it says, not a network"
    else:
        refuse_teacher(monkeypatch, RuntimeError("Failed\nat /a/place"))
        reason = "compact_cnn cannot be exported: RuntimeError"
    export_student.main("distillation")
    assert [path.name for path in trained.glob("*.onnx")] == ["student.onnx"]
    results = measured()
    assert list(results) == ["pytorch", "student", "no_teacher"]
    assert results["no_teacher"] == reason


def test_a_full_disk_is_not_taken_for_a_teacher_that_cannot_be_exported(trained: Path, monkeypatch: pytest.MonkeyPatch):
    refuse_teacher(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        export_student.main("distillation")
    assert not trained.exists()
