import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.dataset import Dataset
from pipeline.data.prepared import TrainingData
from pipeline.evaluation.comparisons import Evaluation, confusions, evaluate_track, loss_curves, read_evaluation, write_evaluation
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.networks.description import Description, Epoch, checkpoint_path

MODELS = ("big", "small")
FILES = ("metrics/toy.json", "metrics/toy_comparisons.json", "metrics/detail/toy.json", "metrics/predictions/toy.npz")


def save(folder: Path, dataset: Dataset, model: str, seed: int, accuracy: float = 0.5) -> None:
    """An untrained network as a checkpoint: its classes are those that its random weights name."""
    arguments = {"width": 2, "hidden": 8 if model == "big" else 4}
    epochs = [(2.0, 1.0), (1.5 + seed, 0.5)]
    history = [Epoch(train_loss=a, train_accuracy=0.5, val_loss=b, val_accuracy=accuracy) for a, b in epochs]
    description = Description(
        format=3,
        digest=f"{model}{seed}",
        setting=model,
        model=model,
        architecture="compact_cnn",
        arguments=arguments,
        dataset=dataset,
        seed=seed,
        parameters={"lr": 0.1},
        device="cpu",
        history=history,
        best_epoch=2,
        chance=0.1,
    )
    classifier = new_classifier("compact_cnn", arguments, dataset, seed)
    save_checkpoint(checkpoint_path(folder / model, seed), classifier, description)


@pytest.fixture
def models(tmp_path: Path, data: TrainingData) -> Path:
    for model in MODELS:
        for seed in (0, 3):
            save(tmp_path / "models", data.dataset, model, seed, accuracy=0.1 if (model, seed) == ("small", 3) else 0.5)
    return tmp_path / "models"


@pytest.fixture
def evaluate(models: Path, data: TrainingData) -> Callable[[], Evaluation]:
    options = {"models": MODELS, "comparisons": [("small", "big")], "teachers": {"small": "big"}}
    return lambda: evaluate_track("toy", models, data.dataset, data.train, **options)


def test_figures_are_those_of_the_checkpoints(evaluate: Callable[[], Evaluation], models: Path):
    evaluation = evaluate()
    for model, entry in evaluation.detail["models"].items():
        assert (entry["seeds"], entry["digests"]) == ([0, 3], [f"{model}0", f"{model}3"])
        assert entry["checkpoints"] == [md5(path) for path in sorted((models / model).iterdir())]
        for values, probabilities in zip(entry["figures"], evaluation.probabilities[model], strict=True):
            assert values["accuracy"] == accuracy_score(evaluation.labels, probabilities.argmax(axis=1))
        mean = np.mean([values["accuracy"] for values in entry["figures"]])
        assert evaluation.metrics[model]["accuracy"] == pytest.approx(mean)
        assert {f"precision{end}" for end in ("", "_sd", "_ci95")} <= set(entry["by_class"]["7"])
    assert evaluation.metrics["big"]["parameters"] > evaluation.metrics["small"]["parameters"]
    assert evaluation.metrics["small"]["final_train_loss"] == 3
    small, big = evaluation.probabilities["small"], evaluation.probabilities["big"]
    agreement = np.mean(small.argmax(axis=2) == big.argmax(axis=2))
    assert evaluation.metrics["small"]["agreement_with_teacher"] == pytest.approx(agreement)
    assert "agreement_with_teacher" not in evaluation.metrics["big"]
    gain = evaluation.metrics["small"]["accuracy"] - evaluation.metrics["big"]["accuracy"]
    assert evaluation.comparisons["small_vs_big"]["gain"] == pytest.approx(gain)
    assert evaluation.detail["models"]["small"]["at_chance"] == [3]
    assert evaluation.detail["models"]["big"]["at_chance"] == []


def test_the_files_hold_the_evaluation_and_are_the_same_bytes_again(evaluate: Callable[[], Evaluation], tmp_path: Path):
    evaluation = evaluate()
    write_evaluation(evaluation, tmp_path / "one")
    write_evaluation(evaluate(), tmp_path / "two")
    written = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert sorted(map(str, written)) == sorted([*FILES, *(f"metrics/plots/toy/{name}.csv" for name in ("confusion", "losses"))])
    for path in written:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    again = read_evaluation("toy", lambda path: (tmp_path / "one" / path).read_bytes())
    assert again[:3] == evaluation[:3]
    assert np.array_equal(again.labels, evaluation.labels)
    for model, probabilities in evaluation.probabilities.items():
        assert probabilities.dtype == np.float32
        assert np.array_equal(again.probabilities[model], probabilities)
    assert np.load(tmp_path / "one" / FILES[3])["seeds"].tolist() == [0, 3]


def test_the_plots_values(evaluate: Callable[[], Evaluation], data: TrainingData, tmp_path: Path):
    evaluation = evaluate()
    losses = loss_curves(evaluation).set_index(["model", "epoch", "split"])
    assert losses.loc[("big", 2, "train")].to_dict() == {"loss": 3.0, "low": 1.5, "high": 4.5}
    assert len(losses) == 2 * 2 * 2
    write_evaluation(evaluation, tmp_path)
    frame = pd.read_csv(tmp_path / "metrics/plots/toy/confusion.csv", dtype={"actual": str, "predicted": str})
    assert frame.columns.tolist() == ["model", "actual", "predicted", "count"]
    cell = frame.set_index(["model", "actual", "predicted"])["count"]["small"]["4"]["9"]
    predicted = evaluation.probabilities["small"].argmax(axis=2)
    assert cell == confusions(evaluation)["small"][4, 9] == ((predicted == 9) & (evaluation.labels == 4)).sum()
    assert frame["count"].sum() == 2 * 2 * len(data.train.labels)


def test_other_data_other_seeds_and_no_checkpoints_are_refused(
    evaluate: Callable[[], Evaluation], models: Path, data: TrainingData
):
    other = data.dataset.model_copy(update={"name": "other"})
    save(models, other, "big", 3)
    with pytest.raises(UserError, match=r"seed3\.safetensors: trained on other data \(other\)"):
        evaluate()
    checkpoint_path(models / "big", 3).unlink()
    with pytest.raises(UserError, match="different seeds"):
        evaluate()
    checkpoint_path(models / "big", 0).unlink()
    with pytest.raises(UserError, match="big: no checkpoints"):
        evaluate()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "list"])
@pytest.mark.parametrize("file", FILES)
def test_missing_and_damaged_files_are_named(file: str, damage: str, evaluate: Callable[[], Evaluation], tmp_path: Path):
    write_evaluation(evaluate(), tmp_path)
    content = (tmp_path / file).read_bytes()
    damaged = {"empty": b"", "cut": content[: len(content) // 2], "noise": b"\x93NUMPY\xff\x00" * 9, "list": b"[1, 2]"}
    (tmp_path / file).unlink() if damage == "missing" else (tmp_path / file).write_bytes(damaged[damage])
    with pytest.raises(UserError, match=f"{file}: missing or damaged"):
        read_evaluation("toy", lambda path: (tmp_path / path).read_bytes())


def test_predictions_of_other_models_are_refused(evaluate: Callable[[], Evaluation], tmp_path: Path):
    write_evaluation(evaluate(), tmp_path)
    detail = json.loads((tmp_path / FILES[2]).read_text())
    detail["models"]["small"]["seeds"] = [0]
    (tmp_path / FILES[2]).write_text(json.dumps(detail))
    with pytest.raises(UserError, match=r"toy.npz: .* small: probabilities of shape \(2, 400, 10\)"):
        read_evaluation("toy", lambda path: (tmp_path / path).read_bytes())


def test_reading_needs_no_heavy_library():
    code = "import sys, pipeline.evaluation.comparisons; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "sklearn", "scipy", "pandas", "matplotlib", "mlflow", "dvc"} & set(modules)
