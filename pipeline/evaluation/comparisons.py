"""A track's models on its test images: predictions, figures over the seeds, comparisons, and their files (read without torch)."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.files import md5, write_atomic, write_json
from pipeline.data.dataset import Dataset
from pipeline.networks.description import Description, checkpoints_in

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.data.prepared import Split

FILES = ("metrics/{}.json", "metrics/{}_comparisons.json", "metrics/detail/{}.json", "metrics/predictions/{}.npz")


class Evaluation(NamedTuple):
    """A track's results, as the stage evaluate writes them.

    Attributes
    ----------
    metrics : dict
        By model: means over the seeds, `_sd` and `_ci95` beside what varies, and `parameters` (their number).
    comparisons : dict
        By "<model>_vs_<other>": the figures of `statistics.Comparison` and its verdict.
    detail : dict
        `track`, `dataset` (a Dataset) and by model, under `models`: the training's `architecture`, `arguments`, `parameters` and
        `setting`; by seed, `seeds`, `digests`, `checkpoints` (MD5), `best_epochs`, `figures` and `histories` (a dict per epoch);
        `at_chance` (the seeds that learned nothing); `by_class` (means over the seeds).
    labels : int64 array of shape (N,)
    probabilities : dict of float32 arrays of shape (S, N, K)
        By model; in the order of the seeds, the test images and the classes.
    """

    metrics: dict[str, dict[str, float]]
    comparisons: dict[str, dict[str, Any]]
    detail: dict[str, Any]
    labels: np.ndarray
    probabilities: dict[str, np.ndarray]

    def pooled(self, model: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels (S * N,) and probabilities (S * N, K) of one model, all seeds."""
        probabilities = self.probabilities[model]
        return np.tile(self.labels, len(probabilities)), probabilities.reshape(-1, probabilities.shape[2])


class _Predictions(NamedTuple):
    """One checkpoint on the test images."""

    md5: str
    description: Description
    parameters: int  # of the network
    probabilities: np.ndarray  # float64, (N, K)


def evaluate_track(
    track: str,
    folder: Path,
    dataset: Dataset,
    test: "Split",
    models: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    teachers: Mapping[str, str],
) -> Evaluation:
    """Evaluate every checkpoint in `folder`/<model>.

    `comparisons` are pairs of models, `teachers` the model that a student's fidelity is measured by, seed by seed.

    Raises UserError if a checkpoint is missing, damaged or trained on other data than `dataset`, and if the models' seeds differ.
    """
    from pipeline.evaluation.metrics import fidelity, over_seeds, score
    from pipeline.evaluation.statistics import compare

    labels = test.labels.cpu().numpy()
    predictions = {model: [_predict(path, dataset, test) for path in checkpoints_in(folder / model)] for model in models}
    seeds = {model: [run.description.seed for run in runs] for model, runs in predictions.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise UserError(f"{folder}: the models were trained with different seeds, {seeds}: run dvc repro")
    figures = {model: [score(labels, run.probabilities) for run in runs] for model, runs in predictions.items()}
    for student, teacher in teachers.items():
        for values, ours, theirs in zip(figures[student], predictions[student], predictions[teacher], strict=True):
            values.update(fidelity(ours.probabilities, theirs.probabilities))
    metrics, details, correct, probabilities = {}, {}, {}, {}
    for model, runs in predictions.items():
        losses = [{"final_train_loss": run.description.history[-1].train_loss} for run in runs]
        varying = [values | loss for values, loss in zip(figures[model], losses, strict=True)]
        metrics[model] = over_seeds(varying) | {"parameters": runs[0].parameters}
        details[model] = _detail(runs, labels) | {"figures": figures[model]}
        correct[model] = np.stack([run.probabilities.argmax(axis=1) == labels for run in runs])
        probabilities[model] = np.stack([run.probabilities for run in runs]).astype(np.float32)
    compared = {f"{model}_vs_{other}": compare(correct[model], correct[other]).as_json() for model, other in comparisons}
    detail = {"track": track, "dataset": dataset.model_dump(mode="json"), "models": details}
    return Evaluation(metrics, compared, detail, labels, probabilities)


def _predict(path: Path, dataset: Dataset, test: "Split") -> _Predictions:
    """One checkpoint's predictions. Raises UserError if it was trained on other data than `dataset`."""
    from pipeline.networks.checkpoints import load_checkpoint
    from pipeline.networks.inference import predict

    classifier, description = load_checkpoint(path, test.labels.device)
    if description.dataset != dataset:
        raise UserError(f"{path}: trained on other data ({description.dataset.name}) than is in data/: run dvc repro")
    probabilities = predict(classifier, test.images).double().softmax(dim=1).cpu().numpy()
    return _Predictions(md5(path), description, sum(p.numel() for p in classifier.parameters()), probabilities)


def _detail(runs: Sequence[_Predictions], labels: np.ndarray) -> dict[str, Any]:
    """One model's entry in `Evaluation.detail`, without its figures."""
    from pipeline.evaluation.metrics import by_class, over_seeds
    from pipeline.evaluation.statistics import above_chance

    descriptions = [run.description for run in runs]
    first, images = descriptions[0], descriptions[0].dataset.images["val"]
    classes = [by_class(labels, run.probabilities, first.dataset.classes) for run in runs]
    at_chance = [
        description.seed
        for description in descriptions
        if not above_chance(round(description.best()[0] * images), images, description.chance)
    ]
    return {
        **{key: getattr(first, key) for key in ("architecture", "arguments", "parameters", "setting")},
        "seeds": [description.seed for description in descriptions],
        "digests": [description.digest for description in descriptions],
        "checkpoints": [run.md5 for run in runs],
        "best_epochs": [description.best_epoch for description in descriptions],
        "at_chance": at_chance,
        "by_class": {name: over_seeds([figures[name] for figures in classes]) for name in first.dataset.classes},
        "histories": [[epoch.model_dump() for epoch in description.history] for description in descriptions],
    }


def loss_curves(evaluation: Evaluation) -> "pd.DataFrame":
    """Columns model, epoch (from 1), split (train, val) and, over the seeds, mean `loss` and its range `low`, `high`, nats."""
    import pandas as pd

    rows = [
        {"model": model, "epoch": number, "split": split, "loss": epoch[f"{split}_loss"]}
        for model, entry in evaluation.detail["models"].items()
        for history in entry["histories"]
        for number, epoch in enumerate(history, 1)
        for split in ("train", "val")
    ]
    losses = pd.DataFrame(rows).groupby(["model", "epoch", "split"], sort=False)["loss"]
    return losses.agg(loss="mean", low="min", high="max").reset_index()


def confusions(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """By model, the counts of all seeds, (K, K): rows are the true classes, columns the predicted ones."""
    from pipeline.evaluation.metrics import confusion

    return {model: confusion(*evaluation.pooled(model)) for model in evaluation.probabilities}


def write_evaluation(evaluation: Evaluation, root: Path) -> None:
    """Write the files that `read_evaluation` reads, and the values of DVC's plots, below `root`. Equal input, equal bytes."""
    import pandas as pd

    metrics, comparisons, detail, labels, probabilities = evaluation
    track, classes = detail["track"], detail["dataset"]["classes"]
    counts = confusions(evaluation)
    cells = pd.MultiIndex.from_product([counts, classes, classes], names=["model", "actual", "predicted"])
    confusion = pd.Series(np.stack(list(counts.values())).ravel(), cells, name="count").reset_index()
    for name, frame in (("losses", loss_curves(evaluation)), ("confusion", confusion)):
        write_atomic(root / f"metrics/plots/{track}/{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    *tables, predictions = (path.format(track) for path in FILES)
    for path, content in zip(tables, (metrics, comparisons, detail), strict=True):
        write_json(root / path, content)
    arrays, seeds = io.BytesIO(), next(iter(detail["models"].values()))["seeds"]
    np.savez_compressed(arrays, labels=labels, seeds=np.array(seeds), **probabilities)
    write_atomic(root / predictions, arrays.getvalue())


def read_evaluation(track: str, read: Callable[[str], bytes]) -> Evaluation:
    """A track's results from the files that `read` gives by their path in the checkout.

    Raises UserError if one is missing, damaged or does not fit the others.
    """
    *tables, predictions = (path.format(track) for path in FILES)
    try:
        metrics, comparisons, detail = (dict(json.loads(read(path := table))) for table in tables)
        models, classes = detail["models"], detail["dataset"]["classes"]
        with np.load(io.BytesIO(read(path := predictions)), allow_pickle=False) as arrays:
            labels, probabilities = arrays["labels"], {model: arrays[model] for model in models}
        for model, entry in models.items():
            if probabilities[model].shape != (len(entry["seeds"]), len(labels), len(classes)):
                raise ValueError(f"{model}: probabilities of shape {probabilities[model].shape}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: missing or damaged: {error}: run dvc repro evaluate@{track}") from error
    return Evaluation(metrics, comparisons, detail, labels, probabilities)
