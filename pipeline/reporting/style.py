"""What every figure has in common. It is readable in greyscale: what differs, differs in shape or line as well as in colour."""

import io
from collections.abc import Mapping
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure

from pipeline.evaluation.statistics import CONFIDENCE

MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLES = [
    {"color": colour, "marker": marker, "linestyle": line}
    for colour, marker, line in zip(sns.color_palette("colorblind"), MARKERS, LINES, strict=False)
]  # a colour, a marker and a line per model
SURE = f"{100 * CONFIDENCE:.0f} % interval"
LONGEST_NAME = 32  # characters


def literal(name: str) -> str:
    """A name from the user's data as a short text in which Matplotlib finds no mathematics."""
    text = " ".join(name.split())
    short = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 13]}…{text[-12:]}"  # names often differ at the end
    return short.replace("$", r"\$")


def add_legend(figure: Figure, entries: Mapping[str, Any], columns: int = 4) -> None:
    """A legend of artists by label, below every panel: it hides no data."""
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file: equal figures, equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, bbox_inches="tight")
    return content.getvalue()
