"""Text from anybody's data as Markdown, and the table that a run ends with."""

import re
from collections.abc import Iterable, Mapping

from tabulate import tabulate

from pipeline.evaluation.comparisons import Evaluation

# What the original course project reported, of one seed each; accuracy and F1 are shares of 1.
# Baselines: PathMNIST, 7,180 test images. Distillation: MNIST, 10,000 test images.
ORIGINAL = {
    "simple_cnn": {"accuracy": 0.7723, "f1_weighted": 0.7736},
    "resnet18": {"accuracy": 0.8191, "f1_weighted": 0.8270},
    "teacher": {"accuracy": 0.9881},
    "student_distilled": {"accuracy": 0.9872},
    "student_alone": {"accuracy": 0.9864},
}
# Its recipe, by a parameter's last name, as far as it can be compared: it also kept the last epoch, and no validation images.
RECIPE = {"epochs": 5, "lr": 0.001, "schedule": "constant", "weight_decay": 0, "label_smoothing": 0, "class_weights": "none"}
RECIPE |= {
    "augmentation": "none",
    "label_fraction": 1,
    "teacher_epochs": None,
    "teacher_label_smoothing": None,
    "alone_epochs": None,
}
RECIPE |= {
    "method": "kd",
    "temperature": 5,
    "alpha": 0.7,
    "logit_standardization": False,
    "ensemble": False,
    "answers": "teacher",
}
RECIPES = {
    "baselines": RECIPE | {"batch_size": 64, "pretrained": True, "stem": "imagenet"},
    "distillation": RECIPE
    | {"batch_size": 128, "architecture": "compact_cnn", "pretrained": False, "logits": None, "features": None},
}
SIZES = {"teacher.width": 32, "teacher.hidden": 128, "student.width": 16, "student.hidden": 64}
FIGURES = {  # of Evaluation.metrics: heading, factor, digits
    "accuracy": ("accuracy (%)", 100, 2),
    "balanced_accuracy": ("balanced accuracy (%)", 100, 2),
    "auc": ("AUC", 1, 4),
    "average_precision": ("average precision", 1, 4),
    "f1_macro": ("macro F1 (%)", 100, 2),
    "f1_weighted": ("weighted F1 (%)", 100, 2),
    "kappa": ("quadratic weighted kappa", 1, 4),
    "nll": ("NLL (nats)", 1, 4),
    "ece": ("ECE (%)", 100, 2),
    "agreement_with_teacher": ("agrees with teacher (%)", 100, 2),
    "kl_from_teacher": ("KL(teacher, student) (nats)", 1, 4),
}
NAMES = {"nll": "nats of negative log-likelihood", "auc": "points of AUC", "ece": "points of ECE"}
MARKUP = r"[\\`*\[\]<>|~#&$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."  # an underscore inside a word marks nothing


def escape(text: object) -> str:
    """`text` as Markdown that shows it on one line, whatever it holds: no markup, HTML, mathematics, link or table cell."""
    plain = re.sub(r"\s+", " ", str(text))
    return re.sub(MARKUP, lambda match: f"&#{ord(match[0])};", plain, flags=re.IGNORECASE)


def markdown_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in GitHub's Markdown of headings and cells that are plain text."""
    headings, *cells = ([escape(cell) for cell in row] for row in (headings, *rows))
    return tabulate(cells, headings, tablefmt="github", disable_numparse=True)


def cell(figures: Mapping[str, float], key: str, factor: float, digits: int) -> str:
    """A figure as text; empty where there is none."""
    return f"{figures[key] * factor:,.{digits}f}" if key in figures else ""


def points(share: float) -> str:
    """A difference of shares as text, in percentage points."""
    return f"{100 * share:+.2f}"


def scale(metric: str) -> int:
    """What a figure is multiplied by to be shown: nats of the negative log-likelihood stay, of any other it is percent."""
    return 1 if metric == "nll" else 100


def difference(metric: str, value: float) -> str:
    """A difference of a figure as text: nats of the negative log-likelihood, percentage points of any other."""
    return f"{value:+.4f}" if metric == "nll" else points(value)


def p_text(p: float) -> str:
    """A p value as text."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def unit(metric: str) -> str:
    """What `difference` counts."""
    return NAMES.get(metric, f"points of {metric.replace('_', ' ')}")


def mean(figures: Mapping[str, float], key: str, factor: float, digits: int) -> str:
    """A figure as text, with the standard deviation over the seeds where there are several."""
    return " ± ".join(cell(figures, name, factor, digits) for name in (key, f"{key}_sd") if name in figures)


def by_model(
    models: Mapping[str, Mapping[str, float]], columns: Mapping[str, tuple[str, float, int]]
) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of figures per model; `columns`: heading, factor and digits by the name of a figure."""
    headings = ["model", *(heading for heading, *_ in columns.values())]
    return headings, [
        [model, *(mean(figures, key, *style) for key, (_, *style) in columns.items())] for model, figures in models.items()
    ]


def results_table(evaluation: Evaluation, original_dataset: str) -> str:
    """A Markdown table with a row per model: means over the seeds and, on its data by its recipe, the original project's figures.

    `original_dataset` names the data that the original course project used.
    """
    dataset = evaluation.detail["dataset"]
    columns = {"parameters": ("parameters", 1, 0)} | {key: FIGURES[key] for key in ("accuracy", "auc", "f1_weighted")}
    headings, rows = by_model(evaluation.metrics, columns)
    original = dataset["name"] == original_dataset and _by_original_recipe(evaluation)
    if original:
        for key, (heading, *style) in columns.items():
            if any(values := [cell(ORIGINAL.get(model, {}), key, *style) for model in evaluation.metrics]):
                headings.append(f"original {heading}")
                rows = [[*row, value] for row, value in zip(rows, values, strict=True)]
    (model, *_) = evaluation.probabilities
    seeds = len(evaluation.probabilities[model])
    images = " / ".join(f"{dataset['images'][split]:,}" for split in ("train", "val", "test"))
    heading = f"{evaluation.detail['track']}: {dataset['name']}, {images} training / validation / test images"
    heading += f", of the first of {dataset['folds']} folds, " if dataset.get("folds") else ", "
    heading += f"{seeds} seed{'s' if seeds > 1 else ''}"
    table = markdown_table(headings, rows)
    notes = ["± is the standard deviation over the seeds."] if seeds > 1 else []
    if original:
        notes.append("Original: the course project's, of one seed, the last epoch, without validation images.")
    return "\n\n".join(filter(None, [escape(heading), table, " ".join(notes)])) + "\n"


def _by_original_recipe(evaluation: Evaluation) -> bool:
    wanted = RECIPES[evaluation.detail["track"]]
    for entry in evaluation.detail["models"].values():
        for key, value in entry["parameters"].items():
            if SIZES.get(key, value) != value or wanted.get(key.rpartition(".")[2], value) != value:
                return False
    return True
