"""The report of a track, in the order in which a reader asks: does it help, how much, where, at what cost, how sure, how run.

It is made of the files in metrics/ and says nothing that is not in them.
"""

import base64
import html
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markdown import markdown
from matplotlib.figure import Figure
from tabulate import tabulate

from pipeline.evaluation.statistics import CONFIDENCE, POWER

SURE = f"{100 * CONFIDENCE:.0f} %"

QUESTIONS = {
    "baselines": "Is ResNet18 worth more than SimpleCNN?",
    "distillation": "Is the distilled student better than the same student trained alone?",
}
HARDEST = 3  # classes named as hardest
MARKERS = "osD^vPX"
NO_REQUESTS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #bbb; padding: .3rem .7rem; text-align: left; }
img { max-width: min(100%, 44rem); }
blockquote { border-left: 4px solid #555; margin-left: 0; padding-left: 1rem; font-size: 1.1rem; }
"""


class Results(NamedTuple):
    """The content of a track's files in metrics/; `exported` is empty for a track without an exported model."""

    metrics: dict[str, dict[str, float]]
    comparisons: dict[str, dict[str, Any]]
    by_class: dict[str, dict[str, dict[str, float]]]
    run: dict[str, Any]
    costs: dict[str, Any]
    exported: dict[str, dict[str, float]]


def write_report(track: str, results: Results, size_plot: str) -> str:
    """The report as Markdown; `size_plot` is the path of the figure of `plot_size`, relative to the report."""
    plots = f"plots/{track}"
    sections = [
        f"# {QUESTIONS[track]}",
        _warnings(results),
        _verdicts(results),
        "## How much",
        _gains(results),
        f"![Gains in accuracy]({plots}/gains.png)",
        _models(results),
        "## On which classes",
        _classes(results),
        *(f"![Confusion matrix of {model}]({plots}/confusion_{model}.png)" for model in results.metrics),
        "## At what cost",
        _costs(results),
        f"![Size against accuracy]({size_plot})",
        _export(results),
        "## How sure",
        _certainty(results),
        f"![Reliability diagrams]({plots}/reliability.png)",
        "## How it was run",
        _run(results),
        f"![Loss curves]({plots}/loss_curves.png)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def sentence(name: str, one: Mapping[str, Any]) -> str:
    """What a comparison shows, in one sentence."""
    model, other = name.split("_vs_")
    over = f"{one['seeds']} seed{'s' if one['seeds'] > 1 else ''} and {one['images']:,} test images"
    gain = f"{_points(one['gain'])} points of accuracy"
    if one["seeds"] == 1:
        return (
            f"**{model}** and **{other}** are **not distinguishable at {SURE}**: {gain} over {over}; a single seed"
            " does not show how much training varies."
        )
    interval = f"{SURE} interval {_points(one['low'])} to {_points(one['high'])}"
    if one["verdict"] == "not distinguishable":
        shown = f"would have shown a difference of {100 * one['detectable']:.2f} points in {100 * POWER:.0f} % of such trials"
        if one["detectable"] > 1:
            shown = "are too few to show any difference"
        verdict = f"**{model}** and **{other}** are **not distinguishable at {SURE}**"
        return f"{verdict}: {gain} ({interval}) over {over}, which {shown}."
    return f"**{model}** is **{one['verdict']}** than **{other}**: {gain} ({interval}) over {over}."


def plot_size(results: Results) -> Figure:
    """Accuracy (%) with its 95 % interval over the size of the file (kB, logarithmic), a marker per model."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for marker, (model, cost) in zip(MARKERS, results.costs["models"].items(), strict=False):
        known = results.metrics.get(model) or results.exported[model]
        accuracy, spread = 100 * known["accuracy"], 100 * known.get("accuracy_ci95", 0)
        label = model if model in results.metrics else f"{model} (the exported seed)"
        size = cost["file_bytes"] / 1000
        axes.errorbar(size, accuracy, yerr=spread or None, fmt=marker, capsize=4, markersize=7, label=label)
    axes.set(xscale="log", xlabel="size of the file (kB)", ylabel="test accuracy (%)")
    axes.legend(fontsize=8)
    return figure


def to_html(text: str, folder: Path, title: str) -> str:
    """One HTML page that needs no other file: the images, whose paths are relative to `folder`, are inside it."""

    def embed(match: re.Match) -> str:
        path = folder / match.group(1)
        content = base64.b64encode(path.read_bytes()).decode()
        return f'src="data:{mimetypes.guess_type(path.name)[0]};base64,{content}"'

    body = re.sub(r'src="([^":]+)"', embed, markdown(text, extensions=["tables"]))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_REQUESTS}">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def _warnings(results: Results) -> str:
    failed = {model: how["at_chance"] for model, how in results.run["models"].items() if how["at_chance"]}
    if not failed:
        return ""
    seeds = "; ".join(f"{model}, seed {', '.join(map(str, found))}" for model, found in failed.items())
    return (
        f"> **Warning:** after training, {seeds}: no better on the validation images than always naming the commonest class."
        " What follows says nothing about such a model: look at its loss curves and its learning rate first."
    )


def _verdicts(results: Results) -> str:
    first, *others = (sentence(name, one) for name, one in results.comparisons.items())
    return f"> {first}\n" + "".join(f"\n- {other}" for other in others)


def _gains(results: Results) -> str:
    headings = [
        "comparison",
        "gain (points)",
        f"{SURE} interval",
        "over seeds (t)",
        "over seeds and images (bootstrap)",
    ]
    headings += ["McNemar p", "detectable (points)", "verdict"]
    rows = [
        [
            name.replace("_vs_", " - "),
            _points(one["gain"]),
            _interval(one, "low", "high"),
            _interval(one, "seeds_low", "seeds_high"),
            _interval(one, "bootstrap_low", "bootstrap_high"),
            f"{one['mcnemar_p']:.3g}",
            f"{100 * one['detectable']:.2f}" if one.get("detectable", 2) <= 1 else "none",
            one["verdict"],
        ]
        for name, one in results.comparisons.items()
    ]
    return _table(rows, headings)


def _models(results: Results) -> str:
    headings = ["model", "accuracy (%)", "AUC", "weighted F1 (%)", "NLL (nats)", "ECE (%)"]
    columns = [("accuracy", 100, 2), ("auc", 1, 4), ("f1_weighted", 100, 2), ("nll", 1, 4), ("ece", 100, 2)]
    if any("agreement_with_teacher" in figures for figures in results.metrics.values()):
        headings += ["agrees with teacher (%)", "KL(teacher, student) (nats)"]
        columns += [("agreement_with_teacher", 100, 2), ("kl_from_teacher", 1, 4)]
    rows = [
        [model, *(_mean(figures, key, factor, digits) for key, factor, digits in columns)]
        for model, figures in results.metrics.items()
    ]
    note = "Means over the seeds, ± half of Student's 95 % interval (standard deviation in brackets)."
    return f"{note}\n\n{_table(rows, headings)}"


def _classes(results: Results) -> str:
    (one, two) = next(iter(results.comparisons)).split("_vs_")
    classes = list(results.by_class[one])
    hardest = sorted(classes, key=lambda name: results.by_class[one][name]["f1"])[:HARDEST]
    headings = ["class", *(f"{key}, {model} (%)" for model in (one, two) for key in ("precision", "recall", "F1"))]
    headings += ["F1 gained (points)"]
    rows = []
    for name in classes:
        pair = [results.by_class[model][name] for model in (one, two)]
        cells = [f"{100 * figures[key]:.2f}" for figures in pair for key in ("precision", "recall", "f1")]
        rows.append([_plain(name), *cells, _points(pair[0]["f1"] - pair[1]["f1"])])
    text = f"Hardest for {one}, by F1: {', '.join(map(_plain, hardest))}. Means over the seeds; single classes were not tested."
    return f"{text}\n\n{_table(rows, headings)}"


def _costs(results: Results) -> str:
    headings = ["model", "parameters", "multiply-adds", "file (kB)", "training of a seed (s)", "latency, 1 image (ms)"]
    headings += ["95th percentile (ms)", "images/s, batches of 256", "peak memory of the process (MiB)"]
    columns = [("parameters", 1, 0), ("multiply_adds", 1, 0), ("file_bytes", 1e-3, 0), ("training_seconds", 1, 1)]
    columns += [("latency_ms", 1, 2), ("latency_p95_ms", 1, 2), ("images_per_second", 1, 0), ("peak_memory_mib", 1, 0)]
    rows = [
        [model, *(f"{cost[key] * factor:,.{digits}f}" if key in cost else "" for key, factor, digits in columns)]
        for model, cost in results.costs["models"].items()
    ]
    machine = results.costs["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"
    note = f"Timings are observations: inference on the CPU ({where}), in float32 but for int8; exported models by ONNX Runtime."
    return f"{note}\n\n{_table(rows, headings)}"


def _export(results: Results) -> str:
    if not results.exported:
        return ""
    lines = [
        "`models/student/` holds the best distilled student on the validation images, exported. On the test images:",
        "",
    ]
    for name, figures in results.exported.items():
        text = f"- {name}: accuracy {100 * figures['accuracy']:.2f} %"
        if "largest_difference" in figures:
            text += f"; probabilities within {figures['largest_difference']:.2g} of PyTorch's,"
            text += f" the same class for {100 * figures['same_predictions']:.2f} % of the images"
        lines.append(text)
    if "student_int8" not in results.exported:
        lines.append("- int8: not kept, it lost too much on the validation images")
    return "\n".join(lines)


def _certainty(results: Results) -> str:
    return (
        "Two things are left to chance, the seed of a training and which images are in the test split. Seeds are paired: with the"
        " same seed, both students start from the same weights and see the same batches. A difference is called better or worse"
        " only if both Student's t interval over the seeds and the bootstrap over seeds and images leave zero out; the 95 %"
        " interval is the wider of the two at either end. McNemar's exact test is of these trained models on these images, its"
        " p values combined over the seeds as twice their mean. Several comparisons are shown and none is corrected for that.\n\n"
        "Calibration: ECE in 15 bins of equal width by the largest probability; a well-calibrated model's points lie on the"
        " diagonal. The diagrams pool the predictions of all seeds."
    )


def _run(results: Results) -> str:
    dataset, models = results.run["dataset"], results.run["models"]
    images = " / ".join(f"{dataset['images'][split]:,}" for split in ("train", "val", "test"))
    machine = results.costs["machine"]
    state = "" if results.costs["code_is_committed"] else ", with uncommitted changes"
    lines = [
        f"- Data: {_plain(dataset['name'])}, {images} training / validation / test images of shape"
        f" {tuple(dataset['image_shape'])}, validation {dataset['validation']}; SHA-256 `{dataset['fingerprint']}`",
        f"- Seeds: {', '.join(map(str, next(iter(models.values()))['seeds']))}; the weights of the best epoch on the validation"
        " images",
        f"- Code: commit `{results.costs['commit']}`{state}",
        f"- Machine of the cost figures: {', '.join(f'{key} {value}' for key, value in machine.items())}",
    ]
    keys = sorted(set().union(*(model["parameters"] for model in models.values())))
    rows = [[key, *(model["parameters"].get(key, "") for model in models.values())] for key in keys]
    rows.append(["best epochs", *(", ".join(map(str, model["best_epochs"])) for model in models.values())])
    return "\n".join(lines) + "\n\n" + _table(rows, ["parameter", *models])


def _mean(figures: Mapping[str, float], key: str, factor: float, digits: int) -> str:
    if key not in figures:
        return ""
    text = f"{figures[key] * factor:.{digits}f}"
    if f"{key}_sd" in figures:
        spread, half = (figures[f"{key}_{kind}"] * factor for kind in ("sd", "ci95"))
        text += f" ± {half:.{digits}f} ({spread:.{digits}f})"
    return text


def _plain(name: str) -> str:
    """A name from the user's data as text that is neither Markdown's table nor HTML."""
    return " ".join(html.escape(name).replace("|", "&#124;").split())


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _interval(one: Mapping[str, float], low: str, high: str) -> str:
    return f"{_points(one[low])} to {_points(one[high])}" if low in one else ""


def _table(rows: Sequence[Sequence[object]], headings: Sequence[str]) -> str:
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True)
