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
from pipeline.evaluation.metrics import over_seeds
from pipeline.evaluation.statistics import CONFIDENCE, FEWEST, FEWEST_IMAGES, OF_CLASSES, POWER
from pipeline.reporting.gallery import confidently_wrong, gallery_table
from pipeline.reporting.tables import FIGURES, by_model, difference, escape, markdown_table, mean, p_text, points, unit

HARDEST = 3  # classes named as hardest
MOST_LOST = 10  # classes named as lost
CALIBRATION = {
    "temperature": ("temperature", 1, 3),
    "nll": ("NLL (nats)", 1, 4),
    "nll_calibrated": ("NLL, scaled", 1, 4),
    "ece": ("ECE (%)", 100, 2),
    "ece_calibrated": ("ECE, scaled (%)", 100, 2),
}
OPERATING_POINTS = {  # also of detail's validation_figures
    "sensitivity": "sensitivity at 0.5",
    "specificity": "specificity at 0.5",
    "sensitivity_youden": "sensitivity at Youden's threshold",
    "specificity_youden": "specificity at Youden's threshold",
}
COSTS = {  # of a model's figures and metrics/<track>_costs.json
    "accuracy": FIGURES["accuracy"],
    "auc": FIGURES["auc"],
    "parameters": ("parameters", 1, 0),
    "multiply_adds": ("multiply-adds", 1, 0),
    "file_bytes": ("file (bytes)", 1, 0),
    "training_seconds": ("training of a seed (s)", 1, 1),
    "with_teacher_seconds": ("with its teacher's (s)", 1, 1),
    "latency_ms": ("latency, 1 image (ms)", 1, 2),
    "latency_p95_ms": ("95th percentile (ms)", 1, 2),
    "images_per_second": ("images/s, batches of 256", 1, 0),
    "peak_memory_mib": ("peak memory of the process (MiB)", 1, 0),
}
SURE = f"{100 * CONFIDENCE:.0f} %"
Format = Literal["markdown", "html"]
Json = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # headings and rows


def render(format: Format, title: str, evaluation: Evaluation, costs: Json, exported: Json, figures: Mapping[str, str]) -> str:
    """The report. With data URIs for figures, its HTML is one page that needs no other file.

    `costs` and `exported` are the contents of metrics/<track>_costs.json and metrics/<track>_export.json, `figures` the addresses
    of what `figures.draw_figures` draws, by file name.
    """
    models, comparisons = evaluation.detail["models"], evaluation.comparisons
    model, other = next(iter(comparisons)).split("_vs_")
    content = {"title": title, "evaluation": evaluation, "costs": costs, "exported": exported, "figures": figures, "model": model}
    content["verdicts"] = [sentence(name, comparison, format) for name, comparison in comparisons.items()]
    content["answer"], *against_teacher = comparisons.values()
    content["headroom"] = against_teacher[-1] if against_teacher else None
    pairs = [name.split("_vs_") for name in comparisons][1:]
    rarest = content["answer"]["smallest_class"] if content["answer"]["metric"] in OF_CLASSES else FEWEST_IMAGES
    few = min(rarest, content["answer"].get("patients", FEWEST_IMAGES)) < FEWEST_IMAGES
    unknown = [few or c["high"] >= c["margin"] or nothing_differed(c) for c in against_teacher]
    content["inferiority"] = [(*pair, of_pair) for pair, of_pair in zip(pairs, unknown, strict=True)]
    classes, recalls = evaluation.detail["dataset"]["classes"], evaluation.detail["recalls"]
    content["absent"] = _absent_classes(evaluation)
    rarest_first = recalls[other]  # those with test images
    by_class = {name: models[model]["by_class"][name] for name in rarest_first}
    content["lost"] = {
        against: [name for name, row in rows.items() if row.get("high", 0) < 0] for against, rows in recalls.items()
    }
    content["tested"], content["most_lost"] = sum("high" in row for row in rarest_first.values()), MOST_LOST
    content["hardest"] = sorted(by_class, key=lambda name: by_class[name]["f1"])[:HARDEST]
    present = set().union(*evaluation.metrics.values())
    measured = {key: column for key, column in FIGURES.items() if key in present}
    chosen = models[model]["parameters"]
    parameters = {key.rpartition(".")[2]: value for key, value in chosen.items()}
    unlabelled = "unlabelled" in evaluation.detail["dataset"]["images"]
    content["same_batches"] = parameters.get("label_fraction", 1) == 1 and not unlabelled
    content["hidden_labels"] = (share := parameters.get("label_fraction", 1)) < 1
    counts = [count for count in evaluation.detail.get("train_images", {}).values() if count]
    content["labels"] = sum(max(1, round(share * count)) for count in counts), sum(counts)  # known, as data/labels.py draws them
    content["parameters"], content["answers"] = parameters, parameters.get("answers", "teacher")
    content["alone_epochs"] = next((v for k, v in models[other]["parameters"].items() if k.endswith(".alone_epochs")), None)
    content["logits"], content["features"] = chosen.get("teacher.logits"), chosen.get("teacher.features")
    content["measured"] = any(entry["architecture"].startswith("outside") for entry in models.values())
    wrong = confidently_wrong(evaluation)
    content["wrong"] = len(wrong)
    content["tables"] = {
        "gains": _gains(comparisons),
        "others": _others(comparisons),
        "models": by_model(evaluation.metrics, measured),
        "classes": _classes(evaluation, model, other),
        "calibration": by_model(evaluation.metrics, CALIBRATION) if "temperature" in evaluation.metrics[model] else None,
        "gallery": gallery_table(wrong, classes),
        "costs": _costs(evaluation, costs["models"], exported, other),
        "parameters": _parameters(models),
    }
    content["other"], content["tables"]["operating_points"], content["shift"] = other, None, None
    if len(classes) == 2:
        content["tables"]["operating_points"], content["shift"] = _operating_points(evaluation)
        content["of_class"] = [
            [int((labels == k).sum()) for labels in (evaluation.val_labels, evaluation.labels)] for k in (0, 1)
        ]
    return tidy(template(format, "report").render(content))


def tidy(text: str) -> str:
    """A template's text with one empty line at most between two others."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def data_uri(png: bytes) -> str:
    """A figure as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def sentence(name: str, comparison: Json, format: Format = "markdown") -> str:
    """What a comparison shows, in one sentence; `name` is "<model>_vs_<other>"."""
    model, other = name.split("_vs_")
    text = template(format, "verdict").render(comparison, model=model, other=other)
    return Markup(" ".join(text.split()))  # noqa: S704 (a template's)


def template(format: Format, name: str) -> jinja2.Template:
    """A template whose variables are escaped for that format."""

    def for_markdown(value: object) -> object:
        return value if isinstance(value, Markup) else Markup(escape(value))  # noqa: S704 (escaped)

    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    options["finalize"] = for_markdown if format == "markdown" else None
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, **options)
    environment.filters |= {
        "points": points,
        "difference": lambda value, metric: difference(metric, value),
        "unit": unit,
        "one_line": lambda text: type(text)(" ".join(text.split())),
    }
    environment.globals |= {"format": f"{format}.jinja", "sure": SURE, "fewest": FEWEST, "power": f"{100 * POWER:.0f} %"}
    environment.globals |= {"fewest_images": FEWEST_IMAGES, "of_classes": OF_CLASSES}
    environment.globals["markdown_table"] = lambda headings, rows: Markup(markdown_table(headings, rows))  # noqa: S704 (escaped)
    return environment.get_template(f"{name}.jinja")


def _gains(comparisons: Json) -> Table:
    metric, folds = (next(iter(comparisons.values())).get(key) for key in ("metric", "folds"))
    kinds = {"": f"{SURE} interval"} | ({} if folds else {"seeds_": "over seeds, on these images"})
    headings = ["comparison", f"gain ({unit(metric)})", *kinds.values(), "p", "detectable", "verdict"]
    rows = []
    for name, comparison in comparisons.items():
        intervals = [_interval(comparison, kind) for kind in kinds]
        p = p_text(comparison["p"])
        detectable = difference(metric, comparison["detectable"])[1:] if comparison.get("detectable") else ""
        verdict = comparison["verdict"]
        if comparison["seeds"] < FEWEST:
            intervals, p, detectable, verdict = ["" for _ in kinds], "", "", "a smoke test"
        gain = difference(metric, comparison["gain"])
        rows.append([name.replace("_vs_", " - "), gain, *intervals, p, detectable, verdict])
    return headings, rows


def _others(comparisons: Json) -> Table:
    """The same of the other figures, without verdicts: what was not chosen beforehand is not tested."""
    (first, *_) = comparisons.values()
    rows = []
    for name, comparison in comparisons.items():
        cells = []
        for metric, other in comparison["others"].items():
            sure = f" ({_interval(other, '')})" if other["seeds"] >= FEWEST else ""
            cells.append(f"{difference(metric, other['gain'])}{sure}")
        rows.append([name.replace("_vs_", " - "), *cells])
    return ["comparison", *(unit(metric) for metric in first["others"])], rows


def _absent_classes(evaluation: Evaluation) -> dict[str, list[str]]:
    """By split that has images, the classes without any, if there are some."""
    classes, absent = evaluation.detail["dataset"]["classes"], {}
    for split, labels in (("validation", evaluation.val_labels), ("test", evaluation.labels)):
        names = [name for label, name in enumerate(classes) if label not in labels]
        absent |= {split: names} if len(labels) and names else {}
    return absent


def nothing_differed(comparison: Json) -> bool:
    """Whether no image makes a difference in any seed, which of so few images says nothing of the margin."""
    return comparison["low"] == comparison["high"] and comparison["verdict"] == "undecided"


def _interval(comparison: Json, kind: str) -> str:
    pair = f"{kind}low", f"{kind}high"
    return " to ".join(difference(comparison["metric"], comparison[key]) for key in pair if key in comparison)


def _costs(evaluation: Evaluation, costs: Json, exported: Json, alone: str) -> Table:
    """A row per route to a cheap model: the track's models, and the exported files; a dash where something is not known."""
    routes = {}
    for model, figures in evaluation.metrics.items():
        entry, route = evaluation.detail["models"][model], model
        if entry["architecture"].startswith("outside: "):
            route = f"{model} ({entry['architecture'].removeprefix('outside: ')})"
        elif model == alone and entry["parameters"].get("student.pretrained"):
            route = f"{model} (the pretrained small network)"
        routes[route] = figures | costs.get(model, {})
    routes |= {file: exported[name] | costs[file] for name in exported if (file := f"{name}.onnx") in costs}
    headings, rows = by_model(routes, COSTS)
    return headings, [[cell or "–" for cell in row] for row in rows]


def _classes(evaluation: Evaluation, model: str, other: str) -> Table:
    """By class, rarest in training first: the student, and its gains over the other model and, in recall, its teacher."""
    detail = evaluation.detail
    (ours, theirs), recalls = (detail["models"][name]["by_class"] for name in (model, other)), detail["recalls"]
    headings = ["class", "training images", "test images", "precision (%)", "recall (%)", "F1 (%)", f"F1 over {other} (points)"]
    rows = []
    for name, row in recalls[other].items():
        cells = [f"{100 * ours[name][key]:.2f}" for key in ("precision", "recall", "f1")]
        gains = [_recall_gain(of_class[name]) for of_class in recalls.values()]
        images = detail.get("train_images", {}).get(name), row["images"]
        images = ["" if count is None else f"{count:,}" for count in images]
        rows.append([name, *images, *cells, points(ours[name]["f1"] - theirs[name]["f1"]), *gains])
    return [*headings, *(f"recall over {against} (points)" for against in recalls)], rows


def _recall_gain(row: Json) -> str:
    gain = points(row["gain"])
    if "low" not in row:
        return gain
    if row["low"] == row["high"]:  # no image and no seed differs from another: they do not say how sure that is
        return f"{gain} ({'all images and seeds alike' if row['gain'] else 'no difference in any seed'})"
    return f"{gain} ({points(row['low'])} to {points(row['high'])})"


def _operating_points(evaluation: Evaluation) -> tuple[Table, dict[str, Any] | None]:
    """Of two classes, validation -> test, and where the two differ most, if there are validation images."""
    rows, changes = [], []
    for model, entry in evaluation.detail["models"].items():
        test, cells = evaluation.metrics[model], []
        validation = over_seeds(entry["validation_figures"])
        for key, heading in OPERATING_POINTS.items():
            pair = [mean(figures, key, 100, 2) for figures in (validation, test) if key in figures]
            cells.append(" → ".join(pair))
            if key in validation:
                changes.append({"model": model, "figure": heading, "val": 100 * validation[key], "test": 100 * test[key]})
        rows.append([model, *cells, mean(test, "youden_threshold", 1, 3)])
    largest = max(changes, key=lambda change: abs(change["test"] - change["val"]), default=None)
    return (["model", *(f"{heading} (%)" for heading in OPERATING_POINTS.values()), "Youden's threshold"], rows), largest


def _parameters(models: Json) -> Table:
    keys = sorted(set().union(*(entry["parameters"] for entry in models.values())))
    rows = [[key, *(entry["parameters"].get(key, "") for entry in models.values())] for key in keys]
    epochs = [", ".join(map(str, entry["best_epochs"])) for entry in models.values()]
    return ["parameter", *models], [*rows, ["best epochs", *epochs]]
