"""Text from anybody's data as Markdown, and the table that a run ends with."""

import re
from collections.abc import Iterable

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
COLUMNS = {  # of metrics/<track>.json: heading, factor, digits, whether the original project reported it
    "accuracy": ("accuracy (%)", 100, 2, True),
    "auc": ("AUC", 1, 4, False),
    "f1_weighted": ("weighted F1 (%)", 100, 2, True),
    "final_train_loss": ("final training loss", 1, 4, True),
}
MARKUP = r"[\\`*\[\]<>|~#&$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."  # an underscore inside a word marks nothing


def escape(text: object) -> str:
    """`text` as Markdown that shows it on one line, whatever it holds: no markup, HTML, mathematics, link or table cell."""
    plain = re.sub(r"\s+", " ", str(text))
    return re.sub(MARKUP, lambda match: f"&#{ord(match[0])};", plain, flags=re.IGNORECASE)


def markdown_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in GitHub's Markdown of headings and cells that are plain text."""
    cells = [[escape(cell) for cell in row] for row in rows]
    return tabulate(cells, [escape(heading) for heading in headings], tablefmt="github", disable_numparse=True)


def image_counts(dataset: dict) -> str:
    """How many images the splits of a data set hold, as text."""
    counts = " / ".join(f"{dataset['images'][split]:,}" for split in ("train", "val", "test"))
    return f"{counts} training / validation / test images"


def results_table(evaluation: Evaluation, original_dataset: str) -> str:
    """A Markdown table with a row per model: mean ± sample standard deviation over the seeds, beside the original project's.

    `original_dataset` names the data that the original course project used.
    """
    dataset = evaluation.detail["dataset"]
    headings = ["model", "parameters"]
    for heading, _, _, reported in COLUMNS.values():
        headings += [heading, f"original ({original_dataset})"] if reported else [heading]
    rows = []
    for model, figures in evaluation.metrics.items():
        row = [model, f"{figures['parameters']:,.0f}"]
        for key, (_, factor, digits, reported) in COLUMNS.items():
            values = [figures[key], *([figures[f"{key}_sd"]] if f"{key}_sd" in figures else [])]
            row.append(" ± ".join(f"{value * factor:.{digits}f}" for value in values))
            if reported:
                original = ORIGINAL[model].get(key)
                row.append("" if original is None else f"{original * factor:.{digits}f}")
        rows.append(row)
    seeds = len(evaluation.probabilities[model])
    heading = f"{evaluation.detail['track']}: {dataset['name']}, {image_counts(dataset)}, {seeds} seed{'s' if seeds > 1 else ''}"
    note = f"Original course project: one seed, on {original_dataset}"
    if dataset["name"] != original_dataset:
        note += f", which is not {dataset['name']}: shown for orientation, no comparison"
    return f"{escape(heading)}\n\n{markdown_table(headings, rows)}\n\n{escape(note)}.\n"
