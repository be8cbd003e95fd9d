"""The picture under the verdict: headroom, gain and deployment, and what each way to a cheap model costs."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from pipeline.evaluation.comparisons import Evaluation
from pipeline.evaluation.jackknife import LOWER_IS_BETTER
from pipeline.evaluation.statistics import FEWEST
from pipeline.reporting.style import STYLES, SURE, add_legend
from pipeline.reporting.tables import FIGURES, difference, scale, unit


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
