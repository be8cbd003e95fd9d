"""A teacher from outside among the evaluated models, with logits of the test images and without; and what the report says."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.prepared import EvaluationData, TrainingData
from pipeline.evaluation.comparisons import Evaluation, evaluate_track, loss_curves, read_evaluation, write_evaluation
from pipeline.evaluation.predictions import predict_track
from pipeline.networks.outside import OutsideTeacher, write_outside
from pipeline.reporting.figures import draw_figures
from pipeline.reporting.report import render
from pipeline.reporting.tables import results_table
from tests.evaluation.samples import PLAN, SEEDS, save
from tests.reporting.conftest import COSTS, EXPORTED

LOGITS = np.random.default_rng(0).normal(size=(400, 10)).astype(np.float32)


def evaluate(folder: Path, data: TrainingData, splits: list[str], kind: str = "logits") -> Evaluation:
    """The evaluation of two students and a teacher from outside; the 400 training images are its test images."""
    dataset = data.dataset.model_copy(update={"images": data.dataset.images | {"test": 400}})
    source = "teacher.logits" if kind == "logits" else "teacher.features"
    parameters = {source: "giant.npz"}
    described = {"kind": kind, "file": "giant.npz", "file_md5": "m", "setting": "s", "fingerprint": dataset.fingerprint}
    described |= {"parameters": parameters, "splits": splits, "weights": None if kind == "logits" else 77}
    for seed in SEEDS:
        for model in (PLAN.distilled, PLAN.alone):
            save(folder, dataset, model, seed, parameters if model == PLAN.distilled else {})
        logits = {split: LOGITS[: dataset.images[split]] for split in splits}
        write_outside(folder / f"teacher/seed{seed}.npz", OutsideTeacher(**described), logits)
    predictions = predict_track(folder, EvaluationData(dataset, data.train, data.val), PLAN.models)
    return evaluate_track("distillation", predictions, PLAN.comparisons, PLAN.teachers)


def said(evaluation: Evaluation, format: str = "markdown") -> str:
    """The report, on one line; a teacher from outside has no costs."""
    costs = COSTS | {"models": {name: cost for name, cost in COSTS["models"].items() if name != "teacher"}}
    figures = draw_figures(evaluation, costs, EXPORTED)
    return " ".join(render(format, "Q", evaluation, costs, EXPORTED, dict.fromkeys(figures, "f")).split())


def test_with_test_logits_it_is_measured_like_a_model(tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", data, ["train", "val", "test"])
    entry = evaluation.detail["models"]["teacher"]
    checksum = md5(tmp_path / "models/teacher/seed0.npz")
    assert (entry["architecture"], entry["arguments"], entry["seeds"]) == ("outside: logits", {}, SEEDS)
    assert (entry["checkpoints"], entry["histories"], entry["best_epochs"]) == ([checksum, checksum], [[], []], [])
    np.testing.assert_allclose(evaluation.probabilities["teacher"][1], softmax(LOGITS, axis=1), rtol=1e-5)
    np.testing.assert_allclose(evaluation.val_probabilities["teacher"][1], softmax(LOGITS[:100], axis=1), rtol=1e-5)
    assert evaluation.metrics["teacher"]["accuracy"] == (LOGITS.argmax(1) == evaluation.labels).mean()
    assert "parameters" not in evaluation.metrics["teacher"]
    assert "agreement_with_teacher" in evaluation.metrics["student_alone"]
    assert len(evaluation.comparisons) == 3
    assert set(loss_curves(evaluation)["model"]) == {PLAN.distilled, PLAN.alone}
    write_evaluation(evaluation, tmp_path)
    again = read_evaluation("distillation", lambda path: (tmp_path / path).read_bytes())
    assert again[:3] == evaluation[:3]
    text = said(again)
    assert "learned from one teacher from outside, the logits in `giant.npz`: the intervals are conditional on" in text
    assert "was not measured" not in text
    assert "linear-probe" not in text
    assert "| teacher " in results_table(again, "digits")
    assert "original" not in results_table(again, "digits")


def test_without_test_logits_it_is_left_out_and_the_report_says_so(tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", data, ["train"])
    assert set(evaluation.metrics) == set(evaluation.detail["models"]) == {PLAN.distilled, PLAN.alone}
    assert set(evaluation.val_probabilities) == {PLAN.distilled, PLAN.alone}
    assert list(evaluation.comparisons) == [f"{PLAN.distilled}_vs_{PLAN.alone}"]
    assert "agreement_with_teacher" not in evaluation.metrics["student_alone"]
    write_evaluation(evaluation, tmp_path)
    assert "It was not measured: its file has none for the test images." in said(evaluation)


def test_a_linear_probe_is_a_baseline_in_the_tables(tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", data, ["train", "test"], "linear probe")
    assert evaluation.metrics["teacher"]["parameters"] == 77
    text = said(evaluation, "html")
    assert "The teacher is the linear-probe baseline: logistic regression on the features in <code>giant.npz</code>." in text
    assert "conditional on these features" in text


def test_logits_of_other_data_are_refused(tmp_path: Path, data: TrainingData):
    evaluate(tmp_path / "models", data, ["train", "test"])
    other = data.dataset.model_copy(update={"images": data.dataset.images | {"test": 400}, "fingerprint": "1" * 64})
    with pytest.raises(UserError, match=r"seed0\.npz: damaged, or made for other data than digits in data/: run dvc repro"):
        predict_track(tmp_path / "models", EvaluationData(other, data.train, data.val), ["teacher"])
