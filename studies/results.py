"""What a study's finished points say: its contrasts and gains, corrected for their number, as a page, tables and a figure."""

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from scipy.stats import t

from pipeline.core.errors import UserError
from pipeline.core.files import read_json, write_atomic
from pipeline.core.provenance import commit
from pipeline.data.npy import read_npz
from pipeline.evaluation.jackknife import FIGURES, LOWER_IS_BETTER
from pipeline.evaluation.metrics import over_seeds
from pipeline.evaluation.statistics import CONFIDENCE, Comparison, analyse
from pipeline.reporting.tables import difference, escape, markdown_table, scale, unit
from studies.tasks import MODELS

CALIBRATED = "_calibrated"  # the end of a figure's name: after temperature scaling on validation images
METRICS = (*FIGURES, *(f"{name}{CALIBRATED}" for name in LOWER_IS_BETTER))
VERDICTS = ("better", "worse", "equivalent", "undecided")
ALPHA = 0.05
PANELS = 4  # side by side


class Question(NamedTuple):
    """A difference between models, and what is claimed of it."""

    title: str
    terms: tuple[tuple[int, str, str], ...]  # that it is the sum of: sign, point's name, model
    metric: str  # one of METRICS
    split: str  # test or val
    claim: str  # better | equivalent | not_inferior | better_or_equivalent
    margin: float

    @property
    def test(self) -> tuple[Any, ...]:
        """What two questions have in common that are one test."""
        return self[1:5]

    @property
    def figure(self) -> str:
        """The metric's unit is that of this one in jackknife.FIGURES."""
        return self.metric.removesuffix(CALIBRATED)


class Row(NamedTuple):
    """A point in a section."""

    point: str  # its name
    labels: dict[str, Any]  # what tells it from the section's other points: values by parameter, or a name of settings
    gain: Question  # the distilled student against the same one alone
    against: Question | None  # the distilled student against that of the section's reference


class Section(NamedTuple):
    """A grid's points of one metric."""

    title: str
    x: str | None  # the label that is the figure's horizontal axis; None: a row per point
    reference: str  # whose distilled student `against` is about, if any is
    rows: list[Row]


class Findings(NamedTuple):
    """A study's questions and what is known of the answers."""

    name: str
    sections: Sequence[Section]
    contrasts: Sequence[Question]  # the fixed sequence
    secondary: Sequence[Question]
    settings: Mapping[str, Mapping[str, Any]]  # by point: what the study names
    paths: Mapping[str, Path]  # by finished point: its result, as in `tasks.result_path`
    answers: Mapping[tuple[Any, ...], Comparison | None]  # by `Question.test`; None: a point of it is missing
    holm: Mapping[tuple[Any, ...], float]  # corrected p values of all that is in no fixed sequence

    @property
    def rows(self) -> dict[str, Row]:
        """By point."""
        return {row.point: row for section in self.sections for row in section.rows}


def find(
    name: str,
    sections: Sequence[Section],
    contrasts: Sequence[Question],
    secondary: Sequence[Question],
    settings: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, Path],
) -> Findings:
    """Answer all questions, as far as their points have finished. Raises UserError where models cannot be paired."""
    rows = [row for section in sections for row in section.rows]
    others = [question for row in rows for question in (row.gain, row.against) if question] + list(secondary)
    answers = {question.test: compare(question, paths) for question in [*contrasts, *others]}
    of_sequence = {question.test[:3] for question in contrasts}
    family = {q.test: p_value(answers[q.test], q.claim, q.margin) for q in others if q.test[:3] not in of_sequence}
    corrected = dict(zip(family, holm(pd.Series(list(family.values()), dtype=float)), strict=True))
    return Findings(name, sections, contrasts, secondary, settings, paths, answers, corrected)


@functools.cache
def jackknifed(path: Path, split: str, model: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,), a figure by seed (S,), and the same without each image (S, N), of one model in a result. Raises UserError."""
    labels, probabilities = _predictions(path, split, model)
    if metric.endswith(CALIBRATED):
        from pipeline.evaluation.calibration import fit_temperature, scaled

        val_labels, val = _predictions(path, "val", model)
        temperatures = [fit_temperature(val_labels, of_seed) for of_seed in val]
        probabilities = [scaled(of_seed, by) for of_seed, by in zip(probabilities, temperatures, strict=True)]
    figures = [FIGURES[metric.removesuffix(CALIBRATED)](labels, of_seed) for of_seed in probabilities]
    return labels, np.array([value for value, _ in figures]), np.stack([without for _, without in figures])


def _predictions(path: Path, split: str, model: str) -> tuple[np.ndarray, np.ndarray]:
    names = f"{split}_labels", f"{split}_{model}"
    arrays = read_npz(path := path.with_suffix(".npz"), names)
    if len(arrays) < len(names):
        raise UserError(f"{path}: no {split} images: a contrast needs them")
    return arrays[names[0]], arrays[names[1]]


def compare(question: Question, paths: Mapping[str, Path]) -> Comparison | None:
    """The answer to a question; None while a point of it is missing. Raises UserError if its points have other images."""
    if any(point not in paths for _, point, _ in question.terms):
        return None
    parts = [jackknifed(paths[point], question.split, model, question.metric) for _, point, model in question.terms]
    labels, _, shape = parts[0][0], *parts[0][1:]
    if any(not np.array_equal(part[0], labels) or part[2].shape != shape.shape for part in parts):
        raise UserError(f"{question.title}: the points have other {question.split} images or seeds: nothing to pair")
    signs = [sign * (-1 if question.figure in LOWER_IS_BETTER else 1) for sign, *_ in question.terms]
    gains, without = (sum(sign * part[place] for sign, part in zip(signs, parts, strict=True)) for place in (1, 2))
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    return analyse(gains.tolist(), without, question.figure, question.margin, smallest)


def outcome(answer: Comparison, claim: str) -> str:
    """What of a claim is shown by itself, or "": by the 95 % interval or, of equivalence, by two one-sided tests at 5 %."""
    if claim == "better_or_equivalent":  # at 5 % together: no true difference makes both false
        return outcome(answer, "better") or outcome(answer, "equivalent")
    shown = {"better": answer.low > 0, "equivalent": answer.equivalent, "not_inferior": answer.low > -answer.margin}
    return claim.replace("_", " ") if answer.enough and shown[claim] else ""


def p_value(answer: Comparison | None, claim: str, margin: float) -> float:
    """Below 5 % where `outcome` shows the claim (or, of better, its reverse); 1 where seeds, images or points are missing."""
    if answer is None or not answer.enough:
        return 1.0
    if claim == "better":
        return answer.p
    error = (answer.high - answer.low) / 2 / t.ppf((1 + CONFIDENCE) / 2, answer.df)
    with np.errstate(divide="ignore"):
        below, above = t.sf(np.divide([margin + answer.gain, margin - answer.gain], error), answer.df)
    return float(min(1, 2 * below) if claim == "not_inferior" else max(below, above))


def holm(p: pd.Series) -> pd.Series:
    """Values of p corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65-70)."""
    ordered = p.sort_values()
    return (ordered * np.arange(len(p), 0, -1)).cummax().clip(upper=1)[p.index]


def sequence(found: Findings) -> list[str]:
    """What becomes of each claim of the fixed sequence, which ends at the first that is not shown."""
    outcomes: list[str] = []
    for question in found.contrasts:
        ended = {"not run", "not shown"} & set(outcomes)
        if (answer := found.answers[question.test]) is None:
            outcomes.append("not run")
        else:
            outcomes.append("not tested" if ended else outcome(answer, question.claim) or "not shown")
    return outcomes


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
        f"Study {found.name}: {len(found.paths)} of {len(found.rows)} points finished, on commit `{commit()}`; {_text(fixed)}.",
        f"The distilled student against the same student alone, at 95 % each: {counts}. Of the {len(found.holm)} comparisons "
        f"in no fixed sequence, {remain} remain at 5 % after correction for their number (Holm 1979; missing ones count).",
    ]
    if found.contrasts:
        numbered = enumerate(zip(found.contrasts, sequence(found), strict=True), 1)
        cells = [[number, *_claim(question, found), result] for number, (question, result) in numbered]
        page += ["## Fixed sequence", "Tested in this order, at 5 % each; the first claim that is not shown ends it."]
        page.append(markdown_table(["", "contrast", "claim", "difference", "interval", "result"], cells))
    if found.secondary:
        cells = [[*_claim(question, found), *_by_holm(question, found)] for question in found.secondary]
        page += ["## Secondary", markdown_table(["contrast", "claim", "difference", "interval", "p, Holm", "result"], cells)]
    for section in found.sections:
        page += [f"## {escape(section.title)}", *_section(section, found, fixed)]
    return "\n\n".join([*page, f"![Gains of study {found.name}]({found.name}.png)"]) + "\n"


def _common(found: Findings, points: Iterable[str]) -> dict[str, Any]:
    """The settings that these points have in common."""
    first, *others = (found.settings[point] for point in points)
    return {key: value for key, value in first.items() if all(other[key] == value for other in others)}


def _text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{escape(key)} {escape(value)}" for key, value in settings.items())


def _claim(question: Question, found: Findings) -> list[str]:
    """Cells: title, claim, difference, and the interval that decides it."""
    answer, claim = found.answers[question.test], f"{question.claim} in {question.metric}".replace("_", " ")
    claim += "" if question.split == "test" else " on validation images"
    if question.claim != "better":
        claim += f", margin {scale(question.figure) * question.margin:g}"
    if answer is None:
        return [question.title, claim, "", ""]
    narrow = "equivalent" in question.claim and not outcome(answer, "better")
    low, high = (answer.low_90, answer.high_90) if narrow else (answer.low, answer.high)
    show = functools.partial(difference, question.figure)
    return [
        question.title,
        claim,
        f"{show(answer.gain)} {unit(question.figure)}",
        f"{90 if narrow else 95} %: {show(low)} to {show(high)}",
    ]


def _by_holm(question: Question, found: Findings) -> list[str]:
    """Cells: the corrected p, and what is shown by it."""
    answer, p = found.answers[question.test], found.holm.get(question.test)
    if answer is None or p is None:
        return ["", "not run" if answer is None else "in the fixed sequence"]
    result = "worse" if question.claim == "better" and answer.gain < 0 else question.claim.replace("_", " ")
    return [f"{p:.3f}", result if p < ALPHA else "not shown"]


def _section(section: Section, found: Findings, fixed: Mapping[str, Any]) -> list[str]:
    """A section's own settings and its table, a row per finished point."""
    metric, labels = section.rows[0].gain.metric, section.rows[0].labels
    own = _common(found, [row.point for row in section.rows])
    cells, own = [], {key: value for key, value in own.items() if key not in fixed and key not in labels}
    for row in (row for row in section.rows if row.point in found.paths):
        figures = read_json(found.paths[row.point])["figures"]["test"]
        means = [f"{scale(metric) * over_seeds(figures[model])[metric]:.2f}" for model in MODELS]
        cells.append([*row.labels.values(), *means, *_interval(row.gain, found), found.answers[row.gain.test].verdict])
        if section.reference:
            cells[-1] += _interval(row.against, found) if row.against else [""] * 3
    headings = [*labels, *(f"{model.removeprefix('student_')} ({'nats' if metric == 'nll' else '%'})" for model in MODELS)]
    headings += [f"gain ({unit(metric)})", "95 % interval", "p, Holm", "distilled is"]
    headings += [f"against {section.reference}", "95 % interval", "p, Holm"] if section.reference else []
    return [text for text in (_text(own), markdown_table(headings, cells) if cells else "not run") if text]


def _interval(question: Question, found: Findings) -> list[str]:
    """Cells: difference, its 95 % interval, and p by Holm."""
    if (answer := found.answers[question.test]) is None:
        return ["not run", "", ""]
    gain, low, high = (difference(question.figure, value) for value in (answer.gain, answer.low, answer.high))
    p = found.holm.get(question.test)
    return [gain, f"{low} to {high}", "in the fixed sequence" if p is None else f"{p:.3f}"]


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
        (_lines if section.x else _forest)(part, section, found)
    return figure


def _height(section: Section) -> float:
    """Inches."""
    if section.x:
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
                gain, low, high, margin = (
                    scale(metric) * value for value in (answer.gain, answer.low, answer.high, answer.margin)
                )
                axes.barh(y, 2 * margin, 1, -margin, color="0.9", zorder=0)
                axes.errorbar(gain, y, xerr=[[gain - low], [high - gain]], fmt="o", color="black", markersize=5, capsize=3)
                text = "{} ({} to {})".format(*(difference(metric, value) for value in (answer.gain, answer.low, answer.high)))
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
