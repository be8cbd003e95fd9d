"""The table that a run ends with: its figures beside the reference's."""

from collections.abc import Mapping

from tabulate import tabulate

from pipeline.data.dataset import Dataset
from pipeline.evaluation.reference import REFERENCE, REFERENCE_DATASET

COLUMNS = {  # of metrics/<track>.json: heading, format, factor
    "accuracy": ("accuracy (%)", ".2f", 100),
    "auc": ("AUC", ".4f", 1),
    "f1_weighted": ("weighted F1 (%)", ".2f", 100),
    "final_train_loss": ("final training loss", ".4f", 1),
}


def results_table(track: str, metrics: Mapping[str, Mapping[str, float]], dataset: Dataset, seeds: int) -> str:
    """A Markdown table with a row per model: mean ± sample standard deviation over the seeds, and the reference's figure.

    `metrics` is the content of metrics/<track>.json.
    """
    theirs = REFERENCE_DATASET[track]
    headings = ["model", "parameters"]
    for key, (heading, _, _) in COLUMNS.items():
        headings += [heading] + ([f"reference ({theirs})"] if key in REFERENCE["simple_cnn"] else [])
    rows = []
    for model, figures in metrics.items():
        row = [model, f"{figures['parameters']:,.0f}"]
        for key, (_, form, factor) in COLUMNS.items():
            cell = f"{figures[key] * factor:{form}}"
            if f"{key}_sd" in figures:
                cell += f" ± {figures[f'{key}_sd'] * factor:{form}}"
            row.append(cell)
            if key in REFERENCE["simple_cnn"]:
                reported = REFERENCE[model].get(key)
                row.append("" if reported is None else f"{reported * factor:{form}}")
        rows.append(row)
    heading = (
        f"{track}: {dataset.name}, {dataset.images['train']:,} / {dataset.images['val']:,} / {dataset.images['test']:,}"
        f" training / validation / test images, {seeds} seed{'s' if seeds > 1 else ''}"
    )
    note = f"Reference: one seed, on {theirs}"
    if dataset.name != theirs:
        note += f", which is not {dataset.name}: shown for orientation, no comparison"
    return f"{heading}\n\n{tabulate(rows, headings, tablefmt='github', disable_numparse=True)}\n\n{note}.\n"
