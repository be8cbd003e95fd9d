import contextlib
import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.prepared import TrainingData, load_evaluation_data
from pipeline.evaluate import train_labels
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.comparisons import FILES, Evaluation, evaluate_track, loss_curves, read_evaluation, write_evaluation
from pipeline.evaluation.predictions import predicted_meanwhile
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import checkpoint_path
from pipeline.reporting.figures import draw_figures
from pipeline.reporting.report import render
from tests.checkout import ROOT
from tests.evaluation.samples import PLAN, SEEDS, evaluate, even_odd, save, with_validation
from tests.reporting.conftest import COSTS, EXPORTED

PATHS = [path.format("distillation") for path in FILES]


@pytest.fixture
def written(tmp_path: Path, data: TrainingData) -> Path:
    write_evaluation(evaluate(tmp_path / "models", data), tmp_path / "written")
    return tmp_path / "written"


def read(folder: Path) -> Evaluation:
    return read_evaluation("distillation", lambda path: (folder / path).read_bytes())


def test_figures_are_those_of_the_checkpoints(tmp_path: Path, data: TrainingData):
    metrics, comparisons, detail, labels, probabilities, *_ = evaluate(tmp_path / "models", data)
    for model, entry in detail["models"].items():
        assert (entry["seeds"], entry["digests"]) == (SEEDS, [f"{model}0", f"{model}3"])
        assert entry["checkpoints"] == [md5(checkpoint_path(tmp_path / "models" / model, seed)) for seed in SEEDS]
        accuracies = [accuracy_score(labels, of_seed.argmax(axis=1)) for of_seed in probabilities[model]]
        assert [figures["accuracy"] for figures in entry["figures"]] == accuracies
        assert metrics[model]["accuracy"] == pytest.approx(np.mean(accuracies))
        assert {f"precision{end}" for end in ("", "_sd", "_ci95")} <= set(entry["by_class"]["7"])
        assert entry["at_chance"] == ([3] if model == "student_alone" else [])
        agreement = np.mean(probabilities[model].argmax(axis=2) == probabilities["teacher"].argmax(axis=2))
        assert metrics[model].get("agreement_with_teacher", 1) == pytest.approx(agreement)
    assert "agreement_with_teacher" not in metrics["teacher"]
    assert metrics["teacher"]["parameters"] > metrics["student_alone"]["parameters"]
    assert metrics["teacher"]["final_train_loss"] == 3
    assert list(detail["recalls"]) == ["student_alone", "teacher"]
    of_class, rarest = labels == 2, [str(number) for number in np.argsort(np.bincount(data.val.labels), kind="stable")]
    recalls = [(probabilities[model].argmax(axis=2)[:, of_class] == 2).mean() for model in ("student_distilled", "teacher")]
    assert detail["recalls"]["teacher"]["2"] == {"images": of_class.sum(), "gain": pytest.approx(recalls[0] - recalls[1])}
    assert list(detail["recalls"]["teacher"]) == rarest
    assert detail["train_images"]["2"] == (data.val.labels == 2).sum()
    gain = metrics["student_distilled"]["accuracy"] - metrics["student_alone"]["accuracy"]
    assert comparisons["student_distilled_vs_student_alone"]["gain"] == pytest.approx(gain)


def test_the_files_hold_the_evaluation_and_are_the_same_bytes_again(written: Path, tmp_path: Path, data: TrainingData):
    evaluation, again = evaluate(tmp_path / "models", data), read(written)
    write_evaluation(evaluation, tmp_path / "again")
    contents = {str(path.relative_to(written)): path.read_bytes() for path in written.rglob("*") if path.is_file()}
    assert set(contents) == {
        *PATHS,
        "metrics/distillation.json",
        *(f"metrics/plots/distillation/{name}.csv" for name in ("confusion", "losses")),
    }
    assert all((tmp_path / "again" / path).read_bytes() == content for path, content in contents.items())
    assert again[:3] == evaluation[:3]
    assert np.array_equal(again.labels, evaluation.labels)
    for model, probabilities in evaluation.probabilities.items():
        assert probabilities.dtype == np.float32
        assert np.array_equal(again.probabilities[model], probabilities)
        assert np.array_equal(again.val_probabilities[model], evaluation.val_probabilities[model])
    assert np.load(written / PATHS[1])["seeds"].tolist() == SEEDS


def test_validation_images_are_predicted_too_where_there_are_some(written: Path, tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", data)
    assert np.array_equal(evaluation.val_labels, data.val.labels)
    for model, probabilities in evaluation.val_probabilities.items():
        path = checkpoint_path(tmp_path / "models" / model, SEEDS[1])
        logits = load_checkpoint(path, data.val.labels.device)[0](data.val.images)
        np.testing.assert_allclose(probabilities[1], logits.softmax(dim=1).detach(), atol=1e-6)
        assert (len(probabilities), probabilities.dtype) == (len(SEEDS), np.float32)
        figures = evaluation.detail["models"][model]["figures"][1]
        assert figures["temperature"] == pytest.approx(fit_temperature(evaluation.val_labels, probabilities[1]), rel=1e-4)
        assert figures["nll_calibrated"] < figures["nll"], "of random weights"
    write_evaluation(evaluate(tmp_path / "without", with_validation(data, 0)), tmp_path)
    arrays = {name: array for name, array in np.load(written / PATHS[1]).items() if not name.startswith("val_")}
    np.savez(written / PATHS[1], **arrays)  # as before validation images were predicted
    for path in (tmp_path, written):
        again = read(path)
        assert (again.val_labels.tolist(), again.val_probabilities) == ([], {})


def test_of_two_classes_the_operating_points_of_test_and_validation_images(tmp_path: Path, data: TrainingData):
    evaluation = evaluate(tmp_path / "models", even_odd(data))
    for model, entry in evaluation.detail["models"].items():
        test, validation = entry["figures"][1], entry["validation_figures"][1]
        named = evaluation.val_probabilities[model][1].argmax(axis=1)
        assert validation["sensitivity"] == recall_score(evaluation.val_labels, named)
        assert validation["specificity"] == recall_score(evaluation.val_labels, named, pos_label=0)
        named = evaluation.probabilities[model][1, :, 1] >= np.float32(test["youden_threshold"])
        assert test["sensitivity_youden"] == pytest.approx(recall_score(evaluation.labels, named), abs=0.01)
        assert set(validation) | {"youden_threshold"} == {key for key in test if key.startswith(("sens", "spec", "youden"))}


def test_the_plots_values(written: Path):
    evaluation = read(written)
    losses = loss_curves(evaluation).set_index(["model", "epoch", "split"])
    assert losses.loc[("teacher", 2, "train")].to_dict() == {"loss": 3.0, "low": 1.5, "high": 4.5}
    assert len(losses) == 3 * 2 * 2
    header, *cells = (written / "metrics/plots/distillation/confusion.csv").read_text().splitlines()
    assert (header, len(cells)) == ("model,actual,predicted,count", 3 * 10 * 10)
    predicted = evaluation.probabilities["student_alone"].argmax(axis=2)
    assert f"student_alone,4,9,{((predicted == 9) & (evaluation.labels == 4)).sum()}" in cells


def test_other_data_other_seeds_and_no_checkpoints_are_refused(tmp_path: Path, data: TrainingData):
    evaluate(tmp_path / "models", data)
    save(tmp_path / "models", data.dataset.model_copy(update={"name": "other"}), "teacher", 3)
    for error, seed in ((r"seed3\.safe.*other data \(other\)", 3), ("different seeds", 0), ("teacher: no checkpoints", 0)):
        with pytest.raises(UserError, match=error):
            evaluate(tmp_path / "models", data)
        checkpoint_path(tmp_path / "models/teacher", seed).unlink(missing_ok=True)


@pytest.mark.parametrize("file", PATHS)
def test_missing_damaged_and_other_files_are_named(file: str, written: Path):
    content, other = (written / file).read_bytes(), io.BytesIO()
    np.savez(other, labels=np.zeros(400), **dict.fromkeys(PLAN.models, np.zeros((1, 400, 10))))  # of one seed
    for damaged in (None, b"", content[: len(content) // 2], b"\x93NUMPY\xff\x00" * 9, b"[1, 2]", other.getvalue()):
        (written / file).unlink() if damaged is None else (written / file).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file}: missing or damaged"):
            read(written)


def test_reading_needs_no_heavy_library():
    heavy = {"torch", "sklearn", "scipy", "pandas", "matplotlib", "mlflow", "dvc"}
    code = f"import sys, pipeline.evaluation.comparisons; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_that_cannot_predict_is_one_error(tmp_path: Path, npz: Path):
    prepare(read_source(str(npz)), 0.1, tmp_path / "data")
    arguments = tmp_path / "models", tmp_path / "data", ["teacher"], "cpu", 1
    with pytest.raises(UserError, match="teacher: no checkpoints"), predicted_meanwhile(*arguments) as predictions:
        predictions()
    with predicted_meanwhile(*arguments) as predictions:
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match="killed or failed"):
            predictions()
    assert not multiprocessing.active_children()


def die_while_sending(pipe: Connection, *_: object):
    os.write(pipe.fileno(), struct.pack("!i", 1000) + b"of a thousand bytes")


def test_a_process_that_dies_while_it_sends_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.evaluation.predictions._work", die_while_sending)
    with predicted_meanwhile(tmp_path, tmp_path, [], "cpu", 1) as predictions, pytest.raises(UserError, match="killed or failed"):
        predictions()


STAGE = """
import multiprocessing
from pathlib import Path
from pipeline.core.cli import run
from pipeline.evaluation.predictions import predicted_meanwhile

def main():
    with predicted_meanwhile(Path("models"), Path(), ["teacher"], "cpu", 1) as predictions:
        print(multiprocessing.active_children()[0].pid, flush=True)
        predictions()

run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_predicts_leaves_ctrl_c_to_its_parent_and_ends_with_it(tmp_path: Path, how: signal.Signals):
    os.mkfifo(tmp_path / "dataset.json")  # where the child waits
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen([sys.executable, "-c", STAGE], cwd=tmp_path, **options) as stage:
        child, reading = psutil.Process(int(stage.stdout.readline())), None
        while reading is None:
            child.send_signal(signal.SIGINT)  # while it starts, too
            with contextlib.suppress(OSError):  # nobody reads yet
                reading = os.open(tmp_path / "dataset.json", os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.05)
        stage.send_signal(how)
        child.wait(20)
        os.close(reading)
        assert stage.stderr.read() == ("interrupted: the same command resumes\n" if how == signal.SIGINT else "")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_in_a_cross_validation_every_seed_is_measured_on_its_own_fold(tmp_path: Path, npz: Path):
    dataset = prepare(read_source(str(npz)), 0.1, tmp_path / "data", folds=3)
    held = load_evaluation_data(tmp_path / "data", torch.device("cpu"))
    assert len(train_labels(tmp_path / "data")) == dataset.images["train"]
    for model in PLAN.models:
        for seed in range(6):
            save(tmp_path / "models", dataset, model, seed)
    with predicted_meanwhile(tmp_path / "models", tmp_path / "data", PLAN.models, "cpu", 1) as predictions:
        evaluation = evaluate_track("distillation", predictions(), PLAN.comparisons, PLAN.teachers)
    labels, probabilities = evaluation.labels, evaluation.probabilities["teacher"]
    assert (len(labels), probabilities.shape) == (700, (6, 700, 10))
    for seed, of_seed in enumerate(probabilities):
        assert np.array_equal(~np.isnan(of_seed[:, 0]), held.rows("test", seed))
        assert np.array_equal(~np.isnan(evaluation.val_probabilities["teacher"][seed][:, 0]), held.rows("test", seed + 1))
        rows, figures = held.rows("test", seed), evaluation.detail["models"]["teacher"]["figures"][seed]
        assert figures["accuracy"] == accuracy_score(labels[rows], of_seed[rows].argmax(axis=1))
    pooled_labels, pooled = evaluation.pooled("teacher")
    assert (pooled.shape, np.isnan(pooled).any(), len(pooled_labels)) == ((1400, 10), False, 1400)
    rounds = evaluation.rounds("teacher")
    assert np.array_equal(rounds[0][held.rows("test", 2)], probabilities[2][held.rows("test", 2)])
    assert np.array_equal(rounds[1][held.rows("test", 2)], probabilities[5][held.rows("test", 2)])
    answer = evaluation.comparisons["student_distilled_vs_student_alone"]
    assert (answer["folds"], answer["images"], answer["df"]) == (3, 700, 2)
    write_evaluation(evaluation, tmp_path)
    again = read(tmp_path)
    np.testing.assert_array_equal(again.probabilities["teacher"], probabilities)
    figures = draw_figures(again, COSTS, EXPORTED)
    text = render("markdown", "Q", again, COSTS, EXPORTED, dict.fromkeys(figures, "f"))
    assert "seed s is tested on fold s mod 3" in text
    assert "over 6 seeds and 700 test images in 3 folds" in text
    assert "corrected resampled t-test" in text
    assert "nan" not in text
