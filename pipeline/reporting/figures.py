"""The report's figures. They are readable in greyscale: what differs, differs in shape or line as well as in colour."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from scipy.stats import t
from sklearn import metrics as sk

from pipeline.evaluation.comparisons import Evaluation, loss_curves
from pipeline.evaluation.jackknife import LOWER_IS_BETTER
from pipeline.evaluation.metrics import confusion, reliability
from pipeline.evaluation.statistics import CONFIDENCE, FEWEST
from pipeline.reporting.tables import FIGURES, difference, scale, unit

MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
STYLES = [
    {"color": colour, "marker": marker, "linestyle": line}
    for colour, marker, line in zip(sns.color_palette("colorblind"), MARKERS, LINES, strict=False)
]  # a colour, a marker and a line per model
SURE = f"{100 * CONFIDENCE:.0f} % interval"
LONGEST_NAME = 32  # characters
GRID = np.r_[0, np.geomspace(1e-4, 1, 1000)]  # distances from the perfect corner: false-positive rates, 1 - recalls
NEAR, SHOWN = 0.04, 5  # where the worst curve is nearer than NEAR, a panel shows SHOWN times its distance
SIDE_BY_SIDE = 10  # classes up to which the confusion matrices of several models stand side by side
MOST_COUNTS = 30  # classes up to which the counts are written into a confusion matrix
MOST_CURVES = 30  # classes up to which ROC and precision-recall curves are drawn
MOST_NAMES = 100  # classes up to which an axis names every one


def draw_figures(evaluation: Evaluation, costs: Mapping[str, Any], exported: Mapping[str, Any]) -> dict[str, bytes]:
    """Every figure of a track's report, as PNG by file name.

    `costs` and `exported` are the contents of metrics/<track>_costs.json and metrics/<track>_export.json. Of more than 30 classes
    there is no curves.png.
    """
    classes = evaluation.detail["dataset"]["classes"]
    bins = {model: [reliability(*of_seed) for of_seed in evaluation.by_seed(model)] for model in evaluation.probabilities}
    figures = {
        "summary": plot_summary(evaluation, costs["models"], exported),
        "loss_curves": plot_loss_curves(loss_curves(evaluation)),
        "reliability": plot_reliability(bins),
        "confusion": plot_confusion({model: confusion(*evaluation.pooled(model)) for model in bins}, classes),
    }
    if len(classes) <= MOST_CURVES:
        figures["curves"] = plot_curves(evaluation)
    return {f"{name}.png": png(figure) for name, figure in figures.items()}


def plot_summary(evaluation: Evaluation, costs: Mapping[str, Any], exported: Mapping[str, Any]) -> Figure:
    """Left, paired differences in the figure that verdicts are on; right, each model's and exported file's, over its latency.

    `costs` are the `models` of metrics/<track>_costs.json, `exported` the content of metrics/<track>_export.json.
    """
    figure = Figure(figsize=(13, 3.6 + 0.4 * len([*differences(evaluation)])), layout="constrained")
    left, right = figure.subplots(1, 2)
    entries = _draw_differences(left, evaluation)
    add_legend(figure, entries | _draw_costs(right, evaluation, costs, exported))
    return figure


def differences(evaluation: Evaluation) -> Iterator[tuple[str, str, str, int, Mapping[str, Any]]]:
    """What a difference answers, its model, the other one, a sign, and the comparison that it is, times that sign.

    Headroom and deployment are there where the teacher was measured.
    """
    answer, *against_teacher = ((*name.split("_vs_"), comparison) for name, comparison in evaluation.comparisons.items())
    for teacher, student, comparison in against_teacher[-1:]:
        yield "headroom", teacher, student, 1, comparison
    yield "gain", *answer[:2], 1, answer[2]
    for teacher, student, comparison in against_teacher:
        yield "deployment", student, teacher, -1, comparison


def _draw_differences(axes: Axes, evaluation: Evaluation) -> dict[str, Any]:
    """Draw a row per difference, its numbers at its right; returns a legend's entries."""
    answer, models = next(iter(evaluation.comparisons.values())), evaluation.detail["models"]
    metric, factor, names, entries = answer["metric"], scale(answer["metric"]), [], {}
    better = -1 if metric in LOWER_IS_BETTER else 1
    for row, (question, model, other, sign, comparison) in enumerate(differences(evaluation)):
        gain, *interval = (sign * comparison[key] for key in ("gain", "low", "high"))
        text, verdict = difference(metric, gain), "a smoke test"
        if comparison["seeds"] >= FEWEST:
            low, high = sorted(interval)
            text += f" ({difference(metric, low)} to {difference(metric, high)})"
            verdict = comparison["verdict"] if sign > 0 else reversed_verdict(comparison["verdict"])
            axes.hlines(row, factor * low, factor * high, color="black", linewidth=2)
            ends = axes.scatter(factor * np.array([low, high]), [row] * 2, s=90, color="black", marker="|")
            entries[f"{SURE} over {'the folds' if comparison.get('folds') else 'seeds and images'}"] = ends
        mean = axes.scatter(factor * gain, row, s=45, color="black", marker="D", zorder=3)
        ours, theirs = (np.array([seed[metric] for seed in models[name]["figures"]]) for name in (model, other))
        seeds = axes.scatter(factor * better * (ours - theirs), [row + 0.25] * len(ours), s=60, color="0.4", marker="|")
        axes.text(1.01, row, f"{text}\n{verdict}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        names.append(f"{question}\n{model}\n- {other}")
    margin = axes.axvspan(-factor * answer["margin"], factor * answer["margin"], color="0.88", zorder=0)
    axes.axvline(0, linestyle=":", color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"difference on the test images ({unit(metric)})")
    axes.set_title("right of zero, the model that is named first is better", fontsize=10)
    return {"difference": mean} | entries | {"of one seed": seeds, "within the margin": margin}


def reversed_verdict(verdict: str) -> str:
    """The verdict on the same two models, the other one named first."""
    return verdict.replace("worse", "better") if verdict.startswith("worse") else verdict.replace("better", "worse")


def _draw_costs(axes: Axes, evaluation: Evaluation, costs: Mapping[str, Any], exported: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a marker per model, a line for one whose latency is not known; returns a legend's entries.

    Of models of one latency, the later ones stand a bit aside.
    """
    files = {file: figures for name, figures in exported.items() if (file := f"{name}.onnx") in costs}
    metric = next(iter(evaluation.comparisons.values()))["metric"]
    heading, factor, _ = FIGURES[metric]
    entries, drawn = {}, []
    for style, (model, figures) in zip(STYLES, (evaluation.metrics | files).items(), strict=False):
        value, half = factor * figures[metric], factor * figures.get(f"{metric}_ci95", 0)
        if model not in costs:
            line = axes.axhline(value, color=style["color"], linestyle=style["linestyle"])
            entries[f"{model}, latency not known"] = line
            continue
        latency = costs[model]["latency_ms"]
        inches = sum(0.9 < other / latency < 1.1 for other in drawn) / 16
        aside = ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
        options = style | {"linestyle": "none", "markersize": 8, "markeredgecolor": "black", "capsize": 4}
        marker = axes.errorbar(latency, value, half or None, transform=axes.transData + aside, **options)
        entries[f"{model}{', one seed' if model in files else ''}"] = marker
        axes.update_datalim([(latency, value - half), (latency, value + half)])
        drawn.append(latency)
    axes.set(xscale="log", xlabel="latency of one image on the CPU (ms)")
    axes.set_ylabel(f"{heading} on the test images{', lower is better' if metric in LOWER_IS_BETTER else ''}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.15)
    axes.autoscale_view()
    bars = f"bars: {SURE} over the seeds\n" if any(f"{metric}_ci95" in of for of in evaluation.metrics.values()) else ""
    axes.set_title(f"{bars}.onnx: by ONNX Runtime, else PyTorch", fontsize=10)
    return entries


def plot_loss_curves(losses: pd.DataFrame) -> Figure:
    """A panel per model of `comparisons.loss_curves`: the mean over the seeds with their range."""
    models = losses["model"].unique()
    figure = Figure(figsize=(4 * len(models), 3.5), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    entries = {}
    for axes, model in zip(panels, models, strict=True):
        for split, style in zip(("train", "val"), STYLES, strict=False):
            curve = losses[(losses["model"] == model) & (losses["split"] == split)]
            if curve.empty:
                continue  # no validation images
            (line,) = axes.plot(curve["epoch"], curve["loss"], markersize=4, markevery=-(-len(curve) // 30), **style)
            band = axes.fill_between(curve["epoch"], curve["low"], curve["high"], alpha=0.2, color=style["color"])
            entries[f"{split}_loss, mean and range over the seeds"] = (line, band)
        axes.set(title=model, xlabel="epoch", ylabel="loss (nats per image)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, entries)
    return figure


def plot_curves(evaluation: Evaluation) -> Figure:
    """Curves of the second of two classes, or the mean over more classes, each against the rest; per model, over the seeds.

    Curves are averaged vertically (Fawcett 2006, Pattern Recognition Letters 27:861-874, algorithm 4); bands are their range.
    Where all come near the perfect corner, a panel shows that corner. Of two classes, a marker shows the mean over the seeds at
    the threshold that is best on the validation images, where there are some (`metrics.youden_threshold`).
    """
    labels, classes = evaluation.labels, evaluation.detail["dataset"]["classes"]
    rates, precisions = {}, {}
    for model in evaluation.probabilities:
        rates[model], precisions[model] = np.stack([mean_curves(*of_seed) for of_seed in evaluation.by_seed(model)], axis=1)
    figure, present = Figure(figsize=(11, 5.8), layout="constrained"), len(np.unique(labels))
    left, right = figure.subplots(1, 2)
    if len(classes) == 2:
        subject, chance = f"positive: {literal(classes[1])}", float(np.mean(labels == 1))
    else:
        subject, chance = f"each of {present} classes against the rest, their mean", 1 / present
    figure.suptitle(f"{subject}; mean and range over the seeds; dotted: chance", fontsize=10)
    _draw(right, 1 - GRID, precisions, [chance, chance])
    right.set(xlabel="recall (sensitivity)", ylabel="precision")
    lines, entries, points = _draw(left, GRID, rates, [0, 1]), {}, {}
    left.set(xlabel="false-positive rate (1 - specificity)", ylabel="true-positive rate (sensitivity)")
    for style, (model, line) in zip(STYLES, lines.items(), strict=False):
        figures = evaluation.metrics[model]
        entries[f"{model}: AUC {figures['auc']:.4f}, average precision {figures['average_precision']:.4f}"] = line
        if "sensitivity_youden" in figures:
            options = {"color": style["color"], "marker": style["marker"], "edgecolor": "black", "s": 120, "zorder": 3}
            label = "large: at the threshold that is best on the validation images"
            points[label] = left.scatter(1 - figures["specificity_youden"], figures["sensitivity_youden"], **options)
    add_legend(figure, entries | points, columns=2)
    return figure


def mean_curves(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True-positive rates at the false-positive rates GRID, and precisions at the recalls 1 - GRID.

    Of labels (N,) and probabilities (N, K): of the second of two classes, or the mean over those that the labels hold.
    """
    rates, precisions = [], []
    for label in [1] if probabilities.shape[1] == 2 else np.unique(labels):
        positive, scores = labels == label, probabilities[:, label]
        false, true, _ = sk.roc_curve(positive, scores)
        rates.append(np.interp(GRID, false, true))
        precision, recall, _ = sk.precision_recall_curve(positive, scores)
        reached = np.searchsorted(recall[::-1], np.maximum(1 - GRID, 1e-9))  # precision is a step function of recall
        precisions.append(precision[::-1][reached])
    return np.mean(rates, axis=0), np.mean(precisions, axis=0)


def _draw(axes: Axes, at: np.ndarray, curves: Mapping[str, np.ndarray], chance: Sequence[float]) -> dict[str, Any]:
    """Draw curves, (S, len(GRID)) by model, at `at`, and that of chance at 0 and 1; returns what a legend shows of each model."""
    drawn, far = {}, []
    for number, (style, (model, values)) in enumerate(zip(STYLES, curves.items(), strict=False)):
        mean = values.mean(axis=0)
        (line,) = axes.plot(at, mean, markevery=(0.05 * number, 0.15), markersize=5, **style)
        drawn[model] = line, axes.fill_between(at, values.min(axis=0), values.max(axis=0), alpha=0.15, color=style["color"])
        far.append(np.maximum(GRID, 1 - mean).min())
    axes.plot([0, 1], chance, ":", color="0.3", linewidth=1)
    corner = 0 < max(far) < NEAR
    low, high = np.array([-0.02, 1.02]) * (max(far) * SHOWN if corner else 1)
    axes.set(xlim=(low, high) if at is GRID else (1 - high, 1 - low), ylim=(1 - high, 1 - low))
    axes.locator_params(nbins=6)
    axes.set_title(f"{'ROC' if at is GRID else 'precision-recall'}{', the corner alone' if corner else ''}", fontsize=10)
    return drawn


def plot_reliability(bins: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """`metrics.reliability` by model and seed: accuracy by confidence of all seeds, and how many predictions each bin holds.

    The interval is over the seeds, by the variance of a ratio of sums (Cochran 1977, Sampling Techniques, eq. 2.46), in bins
    that no seed leaves empty.
    """
    figure = Figure(figsize=(3.7 * len(bins), 4.8), layout="constrained")
    rows = figure.subplots(2, len(bins), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for (upper, lower), (model, of_seeds) in zip(rows.T, bins.items(), strict=True):
        images, confidences, correct = np.stack(of_seeds, axis=1)
        total, seeds = images.sum(axis=0), len(images)
        confidence, accuracy = (sums.sum(axis=0) / np.maximum(total, 1) for sums in (confidences, correct))
        residuals = ((correct - accuracy * images) ** 2).sum(axis=0) * seeds / max(seeds - 1, 1)
        half = t.ppf((1 + CONFIDENCE) / 2, max(seeds - 1, 1)) * np.sqrt(residuals) / np.maximum(total, 1)
        every, filled = (images > 0).all(axis=0) & (seeds > 1), total > 0
        (diagonal,) = upper.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
        upper.plot(confidence[filled], accuracy[filled], "-", color="0.6", linewidth=1)
        (hollow,) = upper.plot(confidence[filled], accuracy[filled], "o", color="black", markerfacecolor="white", markersize=5)
        bar = upper.errorbar(confidence[every], accuracy[every], half[every], fmt="o", color="black", capsize=3, markersize=5)
        upper.set(title=model, xlim=(0, 1.02), ylim=(-0.02, 1.02))
        middles = (np.arange(len(total)) + 0.5) / len(total)
        lower.bar(middles, np.maximum(total, 0.5), width=1 / len(total), color="0.5", edgecolor="white")
        lower.set(yscale="log", ylim=(0.5, None), xlabel="confidence")
    rows[0, 0].set(ylabel="accuracy")
    rows[1, 0].set(ylabel="predictions")
    entries = {"perfectly calibrated": diagonal, f"all seeds, {SURE} over them": bar, "not every seed has predictions": hollow}
    add_legend(figure, entries)
    return figure


def plot_confusion(counts: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Confusion matrices (K, K) by title: colour is the share of the true class, the number in a cell the count."""
    few, across = len(classes) <= MOST_COUNTS, len(classes) <= SIDE_BY_SIDE
    names = [literal(name) for name in classes]
    digits = len(str(max(matrix.max() for matrix in counts.values())))
    cell = max(0.36, 0.075 * digits, 1.6 / len(classes)) if few else 10 / len(classes)  # inches, as are the next three
    longest, side = 0.075 * max(map(len, names)), cell * len(classes)
    columns, rows = (len(counts), 1) if across else (1, len(counts))
    size = 1.2 + longest + (side + 0.2) * columns, (0.8 + side + (longest if longest > cell else 0.2)) * rows
    figure = Figure(figsize=size, layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    named = range(0, len(names), -(-len(names) // MOST_NAMES))
    places, shown = np.array(named) + 0.5 * few, [names[number] for number in named]
    options = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    for axes, (title, matrix) in zip(panels, counts.items(), strict=True):
        shares, own_names = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), not across or axes is panels[0]
        if few:
            cells = {"annot": matrix, "fmt": "d", "annot_kws": {"size": 7}, "linewidths": 0.5, "linecolor": "0.85"}
            sns.heatmap(shares, square=True, cbar=False, ax=axes, **cells, **options)
            for text in axes.texts:
                text.set_in_layout(False)  # measuring hundreds of them takes seconds
        else:  # an image: a heat map takes over a gigabyte
            axes.imshow(shares, **options)
        axes.set_xticks(places, shown, rotation=90 if longest > cell else 0, fontsize=8 if few else 6)
        axes.set_yticks(*((places, shown) if own_names else ([], [])), rotation=0, fontsize=8 if few else 6)
        axes.set_title(literal(title), fontsize=10)
        axes.set(xlabel="predicted", ylabel="true" if own_names else "")
    drawn = (panels[0].collections or panels[0].images)[0]
    figure.colorbar(drawn, ax=panels.tolist(), label="share of the true class", aspect=30, fraction=0.03, pad=0.01, shrink=0.8)
    return figure


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
