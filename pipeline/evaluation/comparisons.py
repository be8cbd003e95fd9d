"""A track's models on its test images: figures over the seeds, comparisons, and their files. Needs no PyTorch."""

import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.data.npy import read_npz
from pipeline.evaluation.predictions import Predictions
from pipeline.networks.description import Description

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 100  # classes up to which the values of confusion matrices hold empty cells, too
FILES = ("metrics/detail/{}.json", "metrics/predictions/{}.npz")  # of a track, in a checkout


class Evaluation(NamedTuple):
    """A track's results, as the stage evaluate writes them.

    `detail` holds `track`, `dataset` (a Dataset) and by model, under `models`: the training's `architecture`, `arguments`,
    `parameters` and `setting`; by seed, `seeds`, `digests`, `checkpoints` (MD5), `best_epochs`, `figures`, `validation_figures`
    (those of `metrics.operating_points`) and `histories` (a dict per epoch); `at_chance` (seeds not shown to beat guessing);
    `by_class` (means over the seeds). Of a teacher from outside, `architecture` is "outside: " and its kind, and the digests are
    those of the files; it has no epochs and no histories. `train_images` holds, by class, how many training images have its
    label; `recalls` the `statistics.recall_gains` of the first comparison's student, over the other model and over its teacher
    (by model, then by class, rarest in training first).
    """

    metrics: dict[str, dict[str, float]]  # by model: `over_seeds` of its figures, and `parameters` (their number)
    comparisons: dict[str, dict[str, Any]]  # by "<model>_vs_<other>": the fields of `statistics.Comparison`, its verdict and,
    # by the name of a figure, `others`: the same without a margin
    detail: dict[str, Any]
    labels: np.ndarray  # int64, (N,)
    # By model, float32, (S, N, K): in the order of the seeds, test images and classes. In a cross-validation, NaN for images that
    # a seed does not test.
    probabilities: dict[str, np.ndarray]
    val_labels: np.ndarray  # int64, (M,), of the validation images; (0,) where there are none, and from an older file
    val_probabilities: dict[str, np.ndarray]  # by model, float32, (S, M, K), likewise, of those that answered for these
    patients: np.ndarray | None = None  # int64, (N,): whose a test image is, where that is known

    def by_seed(self, model: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Labels (n,) and probabilities (n, K) of the images that each seed of a model tests."""
        return [tested(self.labels, of_seed) for of_seed in self.probabilities[model]]

    def pooled(self, model: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels and probabilities of one model, all seeds one after the other."""
        labels, probabilities = zip(*self.by_seed(model), strict=True)
        return np.concatenate(labels), np.concatenate(probabilities)

    def rounds(self, model: str) -> np.ndarray:
        """Probabilities (R, N, K) of all test images: a round is a seed, or as many seeds as a cross-validation has folds."""
        by_image = self.probabilities[model].transpose(1, 0, 2)
        answers = by_image[~np.isnan(by_image[..., 0])]
        return answers.reshape(len(self.labels), -1, by_image.shape[2]).transpose(1, 0, 2)


def check_answers(model: str, probabilities: np.ndarray, folds: bool) -> None:
    """Raises ValueError for probabilities (S, N, K) that are no answers: NaN is for images that a seed's fold does not hold."""
    absent = np.isnan(probabilities).all(axis=2)
    seeds = np.count_nonzero(~absent, axis=0)  # that answer for an image
    equally_often = (seeds == seeds[:1]).all() and seeds.all() and (folds or not absent.any())
    if not (equally_often and np.isfinite(probabilities[~absent]).all()):
        raise ValueError(f"{model}: probabilities that are no numbers")


def tested(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and probabilities (n, K) of the images that a seed answered for, of all N: those without NaN."""
    rows = ~np.isnan(probabilities[:, 0])
    return labels[rows], probabilities[rows]


def evaluate_track(
    track: str,
    predictions: Predictions,
    comparisons: Sequence[tuple[str, str]],
    teachers: Mapping[str, str],
    metric: str = "accuracy",
    margin: float = 0.0,
    train_labels: np.ndarray | None = None,
) -> Evaluation:
    """The figures of a track's models, and what they say against each other.

    `comparisons` are pairs of models, `teachers` the model that a student's fidelity is measured by, seed by seed: each counts
    where its models were predicted. `metric` and `margin`, as in `statistics.Comparison`: what verdicts are on. `train_labels`,
    int64 (N,), say which classes are rare.

    Raises UserError if the models' seeds differ.
    """
    from pipeline.evaluation.metrics import over_seeds

    dataset, models, labels, val_labels, patients = predictions
    comparisons = [pair for pair in comparisons if set(pair) <= set(models)]
    details = {model: answers.detail | {"at_chance": _at_chance(answers.trainings)} for model, answers in models.items()}
    probabilities, val_probabilities = (
        {model: of.probabilities[split] for model, of in models.items() if split in of.probabilities} for split in ("test", "val")
    )
    seeds = {model: detail["seeds"] for model, detail in details.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise UserError(f"{track}: the models were trained with different seeds, {seeds}: run dvc repro")
    metrics = {}
    for model, detail in details.items():
        detail |= _figures(
            predictions, probabilities[model], val_probabilities.get(model), probabilities.get(teachers.get(model))
        )
        metrics[model] = over_seeds(detail["figures"])
        if losses := [{"final_train_loss": history[-1]["train_loss"]} for history in detail["histories"] if history]:
            metrics[model] |= over_seeds(losses)
        if models[model].parameters is not None:
            metrics[model]["parameters"] = models[model].parameters
    compared = {
        f"{model}_vs_{other}": _compare(predictions, probabilities[model], probabilities[other], metric, margin)
        for model, other in comparisons
    }
    detail = {"track": track, "dataset": dataset.model_dump(mode="json"), "models": details}
    if train_labels is not None:
        counts = np.bincount(train_labels[train_labels >= 0], minlength=len(dataset.classes))
        detail["train_images"] = dict(zip(dataset.classes, counts.tolist(), strict=True))
    (student, *others), *_ = comparisons
    against = {other: probabilities[other] for other in (*others, teachers.get(student)) if other in probabilities}
    detail["recalls"] = _recalls(predictions, probabilities[student], against, detail.get("train_images"))
    stored = ({model: p.astype(np.float32) for model, p in of_split.items()} for of_split in (probabilities, val_probabilities))
    return Evaluation(metrics, compared, detail, labels, next(stored), val_labels, next(stored), patients)


def _at_chance(trainings: Sequence[Description]) -> list[int]:
    """The seeds whose best accuracy on validation images, where they have some, may be that of guessing."""
    from pipeline.evaluation.statistics import above_chance

    measured = [(training, training.val_images) for training in trainings if training.val_images]
    return [it.seed for it, images in measured if not above_chance(round(it.best()[0] * images), images, it.chance)]


def _figures(
    predictions: Predictions, probabilities: np.ndarray, val: np.ndarray | None, teacher: np.ndarray | None
) -> dict[str, Any]:
    """`by_class`, `figures` and `validation_figures` of a model in `Evaluation.detail`.

    All are from probabilities (S, N, K): the model's, on test and, where there are some, validation images; and its teacher's.
    """
    from pipeline.evaluation.calibration import calibrated, fit_temperature
    from pipeline.evaluation.metrics import by_class, fidelity, operating_points, over_seeds, score, youden_threshold

    names = predictions.dataset.classes
    classes, of_test, of_validation = [], [], []
    for row, of_seed in enumerate(probabilities):
        test = tested(predictions.labels, of_seed)
        held = None if val is None else tested(predictions.val_labels, val[row])
        figures, points = score(*test, predictions.dataset.ordered), {}
        if len(names) == 2:
            threshold = youden_threshold(*held) if held else None
            figures |= operating_points(*test, threshold)
            if threshold is not None:
                figures["youden_threshold"] = threshold
                points = operating_points(*held, threshold)
        if held:
            figures |= calibrated(*test, fit_temperature(*held))
        if teacher is not None:
            figures |= fidelity(test[1], tested(predictions.labels, teacher[row])[1])
        classes.append(by_class(*test, names))
        of_test.append(figures)
        of_validation.append(points)
    means = {name: over_seeds([of_seed[name] for of_seed in classes]) for name in names}
    return {"by_class": means, "figures": of_test, "validation_figures": of_validation}


def _compare(predictions: Predictions, ours: np.ndarray, theirs: np.ndarray, metric: str, margin: float) -> dict[str, Any]:
    """One of `Evaluation.comparisons`."""
    from pipeline.evaluation.jackknife import FIGURES
    from pipeline.evaluation.statistics import compare

    answers, patients = (predictions.labels, ours, theirs), predictions.patients
    others = {name: compare(*answers, name, patients=patients).as_json() for name in FIGURES if name != metric}
    return compare(*answers, metric, margin, patients).as_json() | {"others": others}


def _recalls(
    predictions: Predictions, ours: np.ndarray, against: Mapping[str, np.ndarray], train_images: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """`statistics.recall_gains` over each of the other models, by the names of the classes, the rarest first."""
    from pipeline.evaluation.statistics import recall_gains

    labels, classes, recalls = predictions.labels, predictions.dataset.classes, {}
    counts = list(train_images.values()) if train_images else np.bincount(labels, minlength=len(classes))
    for other, theirs in against.items():
        gains = recall_gains(labels, ours, theirs, predictions.patients)
        recalls[other] = {classes[label]: gains[label] for label in sorted(gains, key=lambda label: counts[label])}
    return recalls


def loss_curves(evaluation: Evaluation) -> "pd.DataFrame":
    """Columns model, epoch (from 1), split (train, val) and, over the seeds, mean `loss` and its range `low`, `high`, nats."""
    import pandas as pd

    rows = [
        {"model": model, "epoch": number, "split": split, "loss": epoch[f"{split}_loss"]}
        for model, entry in evaluation.detail["models"].items()
        for history in entry["histories"]
        for number, epoch in enumerate(history, 1)
        for split in ("train", "val")
        if epoch[f"{split}_loss"] is not None
    ]
    losses = pd.DataFrame(rows).groupby(["model", "epoch", "split"], sort=False)["loss"]
    return losses.agg(loss="mean", low="min", high="max").reset_index()


def write_evaluation(evaluation: Evaluation, root: Path) -> None:
    """Write, below `root`, what `read_evaluation` reads, and what DVC shows: metrics/<track>.json and the values of plots.

    DVC gets what a table of experiments has room for: of the figure that verdicts are on, each model's and, of the track's
    question, the gain with its interval. Equal input, equal bytes.
    """
    import pandas as pd

    from pipeline.evaluation.metrics import confusion
    from pipeline.evaluation.statistics import FEWEST

    metrics, comparisons, detail, labels, probabilities, val_labels, val_probabilities, patients = evaluation
    (answer, *_) = comparisons.values()
    metric = answer["metric"]
    headline = {model: {metric: figures[metric]} for model, figures in metrics.items()}
    headline["gain"] = answer["gain"]
    if answer["seeds"] >= FEWEST:  # below, an interval says more than is known, and the report has none
        headline |= {"gain_low": answer["low"], "gain_high": answer["high"]}
    track, classes = detail["track"], detail["dataset"]["classes"]
    counts = np.stack([confusion(*evaluation.pooled(model)) for model in probabilities])
    cells = np.argwhere(counts >= (len(classes) > MOST_CELLS))  # of many classes, nearly all cells are empty
    names = np.array([*probabilities], object), *2 * (np.array(classes, object),)
    columns = {name: of[column] for name, of, column in zip(("model", "actual", "predicted"), names, cells.T, strict=True)}
    confusions = pd.DataFrame(columns | {"count": counts[tuple(cells.T)]})
    for name, frame in (("losses", loss_curves(evaluation)), ("confusion", confusions)):
        write_atomic(root / f"metrics/plots/{track}/{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    write_json(root / f"metrics/{track}.json", headline)
    in_detail, in_predictions = (root / path.format(track) for path in FILES)
    write_json(in_detail, detail | {"metrics": metrics, "comparisons": comparisons})
    arrays, seeds = io.BytesIO(), next(iter(detail["models"].values()))["seeds"]
    validation = {f"val_{model}": of_model for model, of_model in val_probabilities.items()}
    whose = {} if patients is None else {"patients": patients}
    np.savez_compressed(
        arrays, labels=labels, seeds=np.array(seeds), **probabilities, val_labels=val_labels, **validation, **whose
    )
    write_atomic(in_predictions, arrays.getvalue())


def read_evaluation(track: str, read: Callable[[str], bytes]) -> Evaluation:
    """A track's results, from `read(path in the checkout)`. Raises UserError if a file is missing, damaged or does not fit."""
    in_detail, in_predictions = (path.format(track) for path in FILES)
    try:
        detail = dict(json.loads(read(path := in_detail)))
        metrics, comparisons = dict(detail.pop("metrics")), dict(detail.pop("comparisons"))
        models, classes = detail["models"], detail["dataset"]["classes"]
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(read(path := in_predictions))
            names = ["labels", *models, "val_labels", *(f"val_{model}" for model in models), "patients"]
            arrays = read_npz(Path(file.name), names)
        labels, probabilities = arrays["labels"], {model: arrays[model] for model in models}
        val_labels, patients = arrays.get("val_labels", np.empty(0, np.int64)), arrays.get("patients")
        validation = {model: arrays[f"val_{model}"] for model in models if f"val_{model}" in arrays}
        for images, of_models in ((len(labels), probabilities), (len(val_labels), validation)):
            for model, of_model in of_models.items():
                if of_model.shape != (len(models[model]["seeds"]), images, len(classes)):
                    raise ValueError(f"{model}: probabilities of shape {of_model.shape}")
                check_answers(model, of_model, bool(detail["dataset"].get("folds")))
        if patients is not None and (patients.dtype.kind, patients.shape) != ("i", labels.shape):
            raise ValueError(f"patients of shape {patients.shape}")
    except Exception as error:  # of a dozen types, on whatever anybody's experiment has in these files
        raise UserError(f"{path}: missing or damaged: {error}: run dvc repro evaluate@{track}") from error
    return Evaluation(metrics, comparisons, detail, labels, probabilities, val_labels, validation, patients)
