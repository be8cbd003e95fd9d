"""Test images that the teacher gets right and the distilled student, confidently, wrong."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.evaluation.comparisons import Evaluation
from pipeline.reporting.figures import literal

MOST_SHOWN = 12
ACROSS = 4


def confidently_wrong(evaluation: Evaluation) -> pd.DataFrame:
    """Test images whose class every seed of the teacher names, and most seeds of the distilled student do not.

    Columns `image` (its number in the test split, from 0), `label`, `predicted` (the student's most probable wrong class),
    `confidence` (of that class) and `teacher` (the teacher's confidence, of the label): means over the seeds, 0-1. The highest
    confidence comes first. Empty where the teacher was not measured.
    """
    columns = ["image", "label", "predicted", "confidence", "teacher"]
    (student, _), *others = (name.split("_vs_") for name in evaluation.comparisons)
    if not others:
        return pd.DataFrame(columns=columns)
    labels, teacher, student = (evaluation.labels, *map(evaluation.rounds, (others[0][0], student)))
    right, wrong = (teacher.argmax(axis=2) == labels).all(axis=0), (student.argmax(axis=2) != labels).mean(axis=0) > 0.5
    images = np.flatnonzero(right & wrong)
    rows, of_images = np.arange(len(images)), labels[images]
    confidences = student[:, images].mean(axis=0)
    confidences[rows, of_images] = -1
    values = images, of_images, confidences.argmax(axis=1), confidences.max(axis=1), teacher[:, images, of_images].mean(axis=0)
    return pd.DataFrame(dict(zip(columns, values, strict=True))).sort_values("confidence", ascending=False, kind="stable")


def gallery_table(wrong: pd.DataFrame, classes: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The first 12 of `confidently_wrong` as headings and rows."""
    headings = ["test image", "class", "the student's class", "its confidence", "the teacher's confidence"]
    rows = [
        [str(row.image), classes[row.label], classes[row.predicted], f"{row.confidence:.2f}", f"{row.teacher:.2f}"]
        for row in wrong.head(MOST_SHOWN).itertuples()
    ]
    return headings, rows


def plot_gallery(wrong: pd.DataFrame, images: np.ndarray, classes: Sequence[str]) -> Figure:
    """The first 12 of `confidently_wrong`, from the test split's images, uint8 (N, H, W, C)."""
    shown = wrong.head(MOST_SHOWN)
    rows = -(-len(shown) // ACROSS)
    figure = Figure(figsize=(2.6 * ACROSS, 3.3 * rows or 1), layout="constrained")
    if not rows:
        figure.suptitle("no such image", fontsize=10)
    for number, row in enumerate(shown.itertuples(), 1):
        axes, pixels = figure.add_subplot(rows, ACROSS, number), images[row.image]
        axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        names = f"true: {literal(classes[row.label])}\nstudent: {literal(classes[row.predicted])}"
        confidences = f"student {row.confidence:.2f}, teacher {row.teacher:.2f}"
        axes.set_title(f"test image {row.image}\n{names}\n{confidences}", fontsize=8)
        axes.set(xticks=[], yticks=[])
    return figure
