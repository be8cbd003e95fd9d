"""Text from anybody's data as Markdown, and the table that a run ends with."""

import re
from collections.abc import Iterable, Mapping

from tabulate import tabulate

from pipeline.evaluation.comparisons import Evaluation

# What the original course project reported, of one seed each; accuracy and F1 are shares of 1.
# Baselines: PathMNIST, 7,180 test images. Distillation: MNIST, 10,000 test images.
ORIGINAL = {
    "simple_cnn": {"accuracy": 0.7723, "f1_weighted": 0.7736, "final_train_loss": 0.2575},
    "resnet18": {"accuracy": 0.8191, "f1_weighted": 0.8270, "final_train_loss": 0.1582},
    "teacher": {"accuracy": 0.9881, "final_train_loss": 0.0123},
    "student_distilled": {"accuracy": 0.9872, "final_train_loss": 0.1191},
    "student_alone": {"accuracy": 0.9864, "final_train_loss": 0.0193},
}
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


def results_table(evaluation: Evaluation, original_dataset: str) -> str:
    """A Markdown table with a row per model: mean ± sample standard deviation over the seeds, beside the original project's.

    `original_dataset` names the data that the original course project used.
    """
    dataset, original = evaluation.detail["dataset"], f"original ({original_dataset})"
    headings = ["accuracy (%)", original, "AUC", "weighted F1 (%)", original, "final training loss", original]
    styles = {"accuracy": (100, 2), "auc": (1, 4), "f1_weighted": (100, 2), "final_train_loss": (1, 4)}  # factor, digits
    rows = []
    for model, figures in evaluation.metrics.items():
        row = [model, cell(figures, "parameters", 1, 0)]
        for key, style in styles.items():
            row.append(" ± ".join(cell(figures, name, *style) for name in (key, f"{key}_sd") if name in figures))
            if key != "auc":  # which the original project did not report
                row.append(cell(ORIGINAL[model], key, *style))
        rows.append(row)
    seeds = len(evaluation.probabilities[model])
    images = " / ".join(f"{dataset['images'][split]:,}" for split in ("train", "val", "test"))
    heading = f"{evaluation.detail['track']}: {dataset['name']}, {images} training / validation / test images, "
    heading += f"{seeds} seed{'s' if seeds > 1 else ''}"
    table = markdown_table(["model", "parameters", *headings], rows)
    note = f"Original course project: one seed, on {original_dataset}"
    if dataset["name"] != original_dataset:
        note += f", which is not {dataset['name']}: shown for orientation, no comparison"
    return f"{escape(heading)}\n\n{table}\n\n{escape(note)}.\n"
