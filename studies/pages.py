"""What is known of a study's questions, as a page, two tables and a figure."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from pipeline.core.files import read_json, write_atomic
from pipeline.core.provenance import commit
from pipeline.evaluation.metrics import over_seeds
from pipeline.reporting.tables import difference, escape, markdown_table, p_text, scale, unit
from studies.contrasts import ALPHA, Findings, Question, Row, Section, outcome, sequence
from studies.tasks import MODELS

VERDICTS = ("better", "worse", "equivalent", "undecided")
PANELS = 4  # side by side


def write_pages(found: Findings, folder: Path) -> str:
    """Write the study's .md, .csv, _seeds.csv and .png; the first."""
    image = io.BytesIO()
    draw(found).savefig(image, format="png", dpi=110)
    files = {".md": markdown(found), ".csv": points_table(found).to_csv(lineterminator="\n"), ".png": image.getvalue()}
    files["_seeds.csv"] = seeds_table(found.paths).to_csv(index=False, lineterminator="\n")
    for suffix, content in files.items():
        write_atomic(folder / f"{found.name}{suffix}", content)
    return files[".md"]


def markdown(found: Findings) -> str:
    """The page: the contrasts, then a table per section, in percent and percentage points (of nll, nats)."""
    verdicts = [answer.verdict for row in found.rows.values() if (answer := found.answers[row.gain.test])]
    counts = ", ".join(f"{verdict} {sum(of_point.startswith(verdict) for of_point in verdicts)}" for verdict in VERDICTS)
    remain, fixed = sum(p < ALPHA for p in found.holm.values()), _common(found, found.rows)
    page = [
        f"Study {found.name}: {len(found.paths)} of {len(found.rows)} points finished, collected by commit `{commit()}`; "
        f"{_text(fixed)}.",
        f"The distilled student against the same student alone, at 95 % each: {counts}. Of the {len(found.holm)} comparisons "
        f"in no fixed sequence, {remain} remain at 5 % after correction for their number (Holm 1979; missing ones count). "
        "A positive difference is an improvement, of a loss or an error too.",
    ]
    claims = ["contrast", "claim", "difference", "interval"]
    if found.contrasts:
        results = zip(found.contrasts, sequence(found), strict=True)
        cells = [[number, *_claim(question, found), result] for number, (question, result) in enumerate(results, 1)]
        page += ["## Fixed sequence", "Tested in this order, at 5 % each; the first claim that is not shown ends it."]
        page.append(markdown_table(["", *claims, "result"], cells))
    if found.secondary:
        cells = [[*_claim(question, found), *_by_holm(question, found)] for question in found.secondary]
        page += ["## Secondary", markdown_table([*claims, "p, Holm", "result"], cells)]
    for section in found.sections:
        page += [f"## {escape(section.title)}", *_section(section, found, fixed)]
    return "\n\n".join([*page, f"![Gains of study {found.name}]({found.name}.png)"]) + "\n"


def _common(found: Findings, points: Iterable[str]) -> dict[str, Any]:
    """The settings that these points have in common."""
    first, *others = (found.settings[point] for point in points)
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape(key)} {escape(value)}" for key, value in settings.items()) or "no setting in common"


def _claim(question: Question, found: Findings) -> list[str]:
    """Cells: title, claim, difference, and the interval that decides it."""
    answer, figure = found.answers[question.test], question.figure
    claim = f"{question.claim} in {question.metric}".replace("_", " ")
    claim += "" if question.split == "test" else " on validation images"
    claim += "" if question.claim == "better" else f", margin {scale(figure) * question.margin:g}"
    if answer is None:
        return [question.title, claim, "", ""]
    narrow = "equivalent" in question.claim and not outcome(answer, "better")
    gain, *ends = _differences(question, answer.gain, *((answer.low_90, answer.high_90) if narrow else (answer.low, answer.high)))
    return [question.title, claim, f"{gain} {unit(figure)}", f"{90 if narrow else 95} %: {' to '.join(ends)}"]


def _differences(question: Question, *values: float) -> list[str]:
    return [difference(question.figure, value) for value in values]


def _by_holm(question: Question, found: Findings) -> list[str]:
    """Cells: the corrected p, and what is shown by it."""
    answer, p = found.answers[question.test], found.holm.get(question.test)
    if answer is None or p is None:
        return ["", "not run" if answer is None else "in the fixed sequence"]
    result = "worse" if question.claim == "better" and answer.gain < 0 else question.claim.replace("_", " ")
    return [p_text(p), result if p < ALPHA else "not shown"]


def _section(section: Section, found: Findings, fixed: Mapping[str, Any]) -> list[str]:
    """A section's own settings and its table, a row per finished point."""
    metric, labels = section.rows[0].gain.metric, section.rows[0].labels
    settings = _common(found, [row.point for row in section.rows])
    settings = {key: value for key, value in settings.items() if key not in fixed and key not in labels}
    headings = [*labels, *(f"{model.removeprefix('student_')} ({'nats' if metric == 'nll' else '%'})" for model in MODELS)]
    headings += [f"gain ({unit(metric)})", "95 % interval", "p, Holm", "distilled is"]
    headings += [f"against {section.reference}", "95 % interval", "p, Holm"] if section.reference else []
    cells = []
    for row in (row for row in section.rows if row.point in found.paths):
        figures = read_json(found.paths[row.point])["figures"]["test"]
        means = [f"{scale(metric) * over_seeds(figures[model])[metric]:.2f}" for model in MODELS]
        cells.append([*row.labels.values(), *means, *_interval(row.gain, found), found.answers[row.gain.test].verdict])
        if section.reference:
            cells[-1] += _interval(row.against, found)
    return [*([_text(settings)] if settings else []), markdown_table(headings, cells) if cells else "not run"]


def _interval(question: Question | None, found: Findings) -> list[str]:
    """Cells: difference, its 95 % interval, and p by Holm; empty without a question."""
    if question is None or (answer := found.answers[question.test]) is None:
        return ["not run" if question else "", "", ""]
    gain, *ends = _differences(question, answer.gain, answer.low, answer.high)
    p = found.holm.get(question.test)
    return [gain, " to ".join(ends), "in the fixed sequence" if p is None else p_text(p)]


def points_table(found: Findings) -> pd.DataFrame:
    """A row per finished point: settings, figures of the test images over the seeds, and the gain."""
    table = {}
    for point, path in found.paths.items():
        question, figures = found.rows[point].gain, read_json(path)["figures"]["test"]
        table[point] = dict(found.settings[point]) | {"metric": question.metric}
        for figure in dict.fromkeys((question.metric, "accuracy", "auc")):
            means = {model: over_seeds(figures[model]) for model in MODELS}
            table[point] |= {
                f"{figure}_{model}{end}": means[model].get(f"{figure}{end}") for model in MODELS for end in ("", "_ci95")
            }
        answer = found.answers[question.test].as_json()
        table[point] |= {key: answer.get(key) for key in ("gain", "low", "high", "p", "detectable", "verdict")}
        table[point]["p_holm"] = found.holm.get(question.test)
    return pd.DataFrame(list(table.values()), pd.Index(table, name="experiment")).drop(columns="seeds", errors="ignore")


def seeds_table(paths: Mapping[str, Path]) -> pd.DataFrame:
    """A row per finished point, seed, split and model, with all figures."""
    results = {point: read_json(path) for point, path in paths.items()}
    return pd.DataFrame(
        {"experiment": point, "seed": seed, "split": split, "model": model} | figures
        for point, result in results.items()
        for split, models in result["figures"].items()
        for model, of_seeds in models.items()
        for seed, figures in zip(result["seeds"], of_seeds, strict=True)
    )


def draw(found: Findings) -> Figure:
    """A part per section: the differences one below the other or, over x, a panel per other setting."""
    heights = [_height(section) for section in found.sections]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, section in zip(parts, found.sections, strict=True):
        part.suptitle(_literal(section.title), fontweight="bold")
        (_lines if _has_axis(section) else _forest)(part, section, found)
    return figure


def _has_axis(section: Section) -> bool:
    """Whether it has an x with more than one value."""
    return bool(section.x) and len({row.labels[section.x] for row in section.rows}) > 1


def _height(section: Section) -> float:
    """Inches."""
    if _has_axis(section):
        return 0.8 + 2.2 * -(-len(_by_line(section)) // PANELS)
    compared = sum(row.against is not None for row in section.rows)
    return 1.4 + 0.28 * len(section.rows) + bool(compared) * (0.7 + 0.28 * compared)


def _label(labels: Mapping[str, Any], *left_out: str | None) -> str:
    parts = (f"{key.rpartition('.')[2]} {value}" for key, value in labels.items() if key not in left_out)
    return _literal(", ".join(parts))


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics


def _forest(part: SubFigure, section: Section, found: Findings) -> None:
    """Differences with their 95 % intervals, a margin as a band, numbers at the right."""
    groups = {"distilled - alone": [(_label(row.labels), row.gain) for row in section.rows]}
    if section.reference:
        rows = [(_label(row.labels), row.against) for row in section.rows if row.against]
        groups[f"distilled - distilled by {section.reference}"] = rows
    ratios, metric = [2 + len(rows) for rows in groups.values()], section.rows[0].gain.metric
    panels = part.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    for axes, (title, rows) in zip(panels, groups.items(), strict=True):
        for y, (_, question) in enumerate(rows):
            text = "not run"
            if answer := found.answers[question.test]:
                values = (answer.gain, answer.low, answer.high, answer.margin)
                gain, low, high, margin = (scale(metric) * value for value in values)
                axes.barh(y, 2 * margin, 1, -margin, color="0.9", zorder=0)
                axes.errorbar(gain, y, xerr=[[gain - low], [high - gain]], fmt="o", color="black", markersize=5, capsize=3)
                text = "{} ({} to {})".format(*_differences(question, answer.gain, answer.low, answer.high))
            axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set(ylim=(len(rows) - 0.5, -0.5))
        axes.set_title(_literal(title), loc="left", fontsize=10)
    panels[-1].set_xlabel(f"difference with its 95 % interval ({unit(metric)}); grey: within the margin")


def _by_line(section: Section) -> dict[str, list[Row]]:
    """The rows by their labels without x."""
    lines: dict[str, list[Row]] = {}
    for row in section.rows:
        lines.setdefault(_label(row.labels, section.x), []).append(row)
    return lines


def _lines(part: SubFigure, section: Section, found: Findings) -> None:
    """The gain over x with its 95 % interval, a panel per line, in each the other lines in grey."""
    lines, metric = _by_line(section), section.rows[0].gain.metric
    shape = -(-len(lines) // PANELS), min(PANELS, len(lines))
    panels = part.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    ticks = list(dict.fromkeys(row.labels[section.x] for row in section.rows))
    for place, axes in enumerate(panels):
        axes.set_visible(place < len(lines))
        axes.tick_params(labelbottom=place + shape[1] >= len(lines))
    for axes, label in zip(panels, lines, strict=False):
        for other, rows in lines.items():
            points = [(row.labels[section.x], answer) for row in rows if (answer := found.answers[row.gain.test])]
            x = [value for value, _ in points]
            gain, low, high = (np.array([scale(metric) * answer[key] for _, answer in points]) for key in (2, 3, 4))
            if other != label:
                axes.plot(x, gain, color="0.75", linewidth=1, zorder=1)
            elif points:
                axes.errorbar(x, gain, [gain - low, high - gain], color="black", marker="o", markersize=4, linewidth=1, capsize=3)
                margin = scale(metric) * points[0][1].margin
                axes.axhspan(-margin, margin, color="0.93", zorder=0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(label, fontsize=9)
        axes.set(xscale="log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    part.supxlabel(_literal(section.x), fontsize=9)
    part.supylabel(f"gain of distillation ({unit(metric)})", fontsize=9)
