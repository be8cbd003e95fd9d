import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy

from pipeline import export_student
from pipeline.data.prepared import Split, TrainingData
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.networks.inference import predict
from tests.checkout import ROOT
from tests.networks.conftest import ARGUMENTS, describe


@pytest.mark.parametrize(("wanted", "validation"), [(0.5, 100), (1.01, 100), (0.5, 0)])
def test_int8_stays_if_it_names_the_same_classes_often_enough(
    tmp_path: Path,
    data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    wanted: float,
    validation: int,
):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    data = data._replace(val=Split(data.val.images[:validation], data.val.labels[:validation]))
    traits, rule = ({"resize": "pad"}, "pad") if validation else ({"name": "pneumoniamnist"}, "crop")
    data = data._replace(dataset=data.dataset.model_copy(update=traits))
    classifier = new_classifier("compact_cnn", ARGUMENTS, data.dataset, 0)
    if validation:  # of which the untrained student knows two thirds
        logits = predict(classifier, data.val.images)
        labels = torch.where(torch.arange(validation) % 3 == 0, data.val.labels, logits.argmax(dim=1))
        data = data._replace(val=Split(data.val.images, labels))
    monkeypatch.setattr(export_student, "load_training_data", lambda *_: data)
    monkeypatch.setattr(export_student, "AGREEMENT", wanted)
    save_checkpoint(Path("models/distillation/student_distilled/seed0.safetensors"), classifier, describe(data.dataset))
    export_student.main("distillation")
    choice = json.loads(Path("models/exported/distillation/choice.json").read_text())
    assert (choice["validation_accuracy"] is None) == (validation == 0)
    assert 0.5 < choice["int8_agreement"] <= 1
    assert choice["int8_kept"] == Path("models/exported/distillation/student_int8.onnx").exists() == (wanted < 1)
    student = Student(Path("models/exported/distillation/student.onnx"))
    assert (student.resize, student.temperature) == (rule, choice["temperature"])
    if validation:
        likeliest = minimize_scalar(lambda t: cross_entropy(logits / t, data.val.labels).item(), bounds=(0.01, 1)).x
    else:
        likeliest = 1
    assert student.temperature == pytest.approx(likeliest, rel=1e-3)
    assert ("not kept" in capsys.readouterr().out) == (wanted > 1)
