"""The report of a track, as Markdown and as HTML. It is made of the files in metrics/ and says nothing that is not in them.

Its text is report.jinja, its parts are in markdown.jinja and html.jinja: what a template shows of the data is always escaped.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from pipeline.evaluation.comparisons import Evaluation
from pipeline.evaluation.statistics import CONFIDENCE, POWER
from pipeline.reporting.tables import escape, image_counts, markdown_table

HARDEST = 3  # classes named as hardest
MODELS = {  # columns of metrics/<track>.json: heading, factor, digits
    "accuracy": ("accuracy (%)", 100, 2),
    "auc": ("AUC", 1, 4),
    "f1_weighted": ("weighted F1 (%)", 100, 2),
    "nll": ("NLL (nats)", 1, 4),
    "ece": ("ECE (%)", 100, 2),
    "agreement_with_teacher": ("agrees with teacher (%)", 100, 2),
    "kl_from_teacher": ("KL(teacher, student) (nats)", 1, 4),
}
COSTS = {  # of metrics/<track>_costs.json
    "parameters": ("parameters", 1, 0),
    "multiply_adds": ("multiply-adds", 1, 0),
    "file_bytes": ("file (kB)", 1e-3, 0),
    "training_seconds": ("training of a seed (s)", 1, 1),
    "latency_ms": ("latency, 1 image (ms)", 1, 2),
    "latency_p95_ms": ("95th percentile (ms)", 1, 2),
    "images_per_second": ("images/s, batches of 256", 1, 0),
    "peak_memory_mib": ("peak memory of the process (MiB)", 1, 0),
}

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # headings and rows


def render(
    format: Literal["markdown", "html"],
    title: str,
    evaluation: Evaluation,
    costs: Mapping[str, Any],
    exported: Mapping[str, Any],
    figures: Mapping[str, str],
) -> str:
    """The report. With data URIs for figures, its HTML is one page that needs no other file.

    `costs` and `exported` are the contents of metrics/<track>_costs.json and metrics/export.json, `figures` the addresses of what
    `figures.draw_figures` draws, by file name.
    """
    environment = _environment(format)
    dataset, models = evaluation.detail["dataset"], evaluation.detail["models"]
    model, other = next(iter(evaluation.comparisons)).split("_vs_")
    by_class = models[model]["by_class"]
    failed = {name: entry["at_chance"] for name, entry in models.items() if entry["at_chance"]}
    text = environment.get_template("report.jinja").render(
        title=title,
        verdicts=[_verdict(environment, *comparison) for comparison in evaluation.comparisons.items()],
        at_chance="; ".join(f"{name}, seed {', '.join(map(str, seeds))}" for name, seeds in failed.items()),
        model=model,
        hardest=sorted(by_class, key=lambda name: by_class[name]["f1"])[:HARDEST],
        tables={
            "gains": _gains(evaluation),
            "models": _models(evaluation),
            "classes": _classes(models, model, other),
            "costs": _costs(costs["models"]),
            "parameters": _parameters(models),
        },
        evaluation=evaluation,
        costs=costs,
        exported=_exported(exported),
        dataset=dataset,
        splits=image_counts(dataset),
        seeds=models[model]["seeds"],
        figures=figures,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def data_uri(png: bytes) -> str:
    """A figure as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def sentence(name: str, comparison: Mapping[str, Any]) -> str:
    """What a comparison shows, in one sentence of Markdown; `name` is "<model>_vs_<other>"."""
    return _verdict(_environment("markdown"), name, comparison)


def _environment(format: str) -> jinja2.Environment:
    """Templates whose variables are escaped for that format."""

    def for_markdown(value: object) -> object:
        return value if isinstance(value, Markup) else Markup(escape(value))  # noqa: S704 (escaped)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=for_markdown if format == "markdown" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"points": _points, "one_line": lambda text: type(text)(" ".join(text.split()))}
    environment.globals |= {
        "format": f"{format}.jinja",
        "sure": f"{100 * CONFIDENCE:.0f} %",
        "power": f"{100 * POWER:.0f} %",
        "markdown_table": lambda headings, rows: Markup(markdown_table(headings, rows)),  # noqa: S704 (escaped)
    }
    return environment


def _verdict(environment: jinja2.Environment, name: str, comparison: Mapping[str, Any]) -> Markup:
    model, other = name.split("_vs_")
    text = environment.get_template("verdict.jinja").render(comparison, model=model, other=other)
    return Markup(" ".join(text.split()))  # noqa: S704 (a template's)


def _gains(evaluation: Evaluation) -> Table:
    headings = ["comparison", "gain (points)", f"{100 * CONFIDENCE:.0f} % interval", "over seeds (t)"]
    headings += ["over seeds and images (bootstrap)", "detectable (points)", "verdict"]
    rows = []
    for name, comparison in evaluation.comparisons.items():
        intervals = []
        for kind in ("", "seeds_", "bootstrap_"):
            ends = [_points(comparison[kind + end]) for end in ("low", "high") if kind + end in comparison]
            intervals.append(" to ".join(ends))
        detectable = f"{100 * comparison['detectable']:.2f}" if comparison.get("detectable", 2) <= 1 else "none"
        rows.append([name.replace("_vs_", " - "), _points(comparison["gain"]), *intervals, detectable, comparison["verdict"]])
    return headings, rows


def _models(evaluation: Evaluation) -> Table:
    present = {key for figures in evaluation.metrics.values() for key in figures}
    columns = {key: column for key, column in MODELS.items() if key in present}
    rows = []
    for model, figures in evaluation.metrics.items():
        row = [model]
        for key, (_, factor, digits) in columns.items():
            cell = f"{figures[key] * factor:.{digits}f}" if key in figures else ""
            if f"{key}_sd" in figures:
                spread, half = (f"{figures[f'{key}_{kind}'] * factor:.{digits}f}" for kind in ("sd", "ci95"))
                cell += f" ± {half} ({spread})"
            row.append(cell)
        rows.append(row)
    return ["model", *(heading for heading, _, _ in columns.values())], rows


def _classes(models: Mapping[str, Any], model: str, other: str) -> Table:
    headings = [f"{key}, {name} (%)" for name in (model, other) for key in ("precision", "recall", "F1")]
    rows = []
    for name, ours in models[model]["by_class"].items():
        theirs = models[other]["by_class"][name]
        cells = [f"{100 * figures[key]:.2f}" for figures in (ours, theirs) for key in ("precision", "recall", "f1")]
        rows.append([name, *cells, _points(ours["f1"] - theirs["f1"])])
    return ["class", *headings, "F1 gained (points)"], rows


def _costs(models: Mapping[str, Mapping[str, float]]) -> Table:
    rows = [
        [model, *(f"{cost[key] * factor:,.{digits}f}" if key in cost else "" for key, (_, factor, digits) in COSTS.items())]
        for model, cost in models.items()
    ]
    return ["model", *(heading for heading, _, _ in COSTS.values())], rows


def _exported(exported: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = []
    for name, figures in exported.items():
        lines.append(f"{name}: accuracy {100 * figures['accuracy']:.2f} %")
        if "largest_difference" in figures:
            lines[-1] += f"; probabilities within {figures['largest_difference']:.2g} of PyTorch's,"
            lines[-1] += f" the same class for {100 * figures['same_predictions']:.2f} % of the images"
    if exported and "student_int8" not in exported:
        lines.append("int8: not kept, it lost too much on the validation images")
    return lines


def _parameters(models: Mapping[str, Any]) -> Table:
    keys = sorted(set().union(*(entry["parameters"] for entry in models.values())))
    rows = [[key, *(entry["parameters"].get(key, "") for entry in models.values())] for key in keys]
    epochs = [", ".join(map(str, entry["best_epochs"])) for entry in models.values()]
    return ["parameter", *models], [*rows, ["best epochs", *epochs]]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
