"""Publish the exported students with the repository: `python -m pipeline.serving.publish` writes models/student/ anew.

It holds a model of every track that was exported and reported here, and README.md, a model card in Hugging Face's format
(https://huggingface.co/docs/hub/model-cards) with the figures in metrics/. All of it is committed.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_folder, read_json
from pipeline.export.onnx_model import Student
from pipeline.params import TRACKS
from pipeline.reporting.report import sentence, template, tidy
from pipeline.serving import refuse_folds

PUBLISHED, EXPORTED, METRICS = Path("models/student"), Path("models/exported"), Path("metrics")
FIGURES = {"accuracy": "accuracy", "auc": "roc_auc", "balanced_accuracy": "balanced_accuracy", "nll": "log_loss", "ece": "ece"}
DIGITS = {  # what medmnist.INFO says of its sets; the licence as the documentation of tf.keras.datasets.mnist has it
    "name": "MNIST",
    "hub": "ylecun/mnist",
    "licence": "CC BY-SA 3.0",
    "description": "Digits written by American census workers and students, size-normalised and centred (LeCun et al. 1998).",
}


def main() -> None:
    """Write models/student/, all of it or nothing."""
    models = [describe(track) for track in TRACKS if (EXPORTED / track / "student.onnx").exists()]
    if not models:
        raise UserError(f"{EXPORTED}: no student.onnx there: dvc repro")
    with atomic_folder(PUBLISHED) as folder:
        for model in models:
            (folder / model["file"]).write_bytes(model["content"])
        (folder / "README.md").write_bytes(card(models).encode())
    for model in models:
        print(f"{PUBLISHED / model['file']}: {len(model['content']):,} bytes, {model['data']['name']}")
    print(f"{PUBLISHED / 'README.md'}: commit the folder")


def describe(track: str) -> dict[str, Any]:
    """What the card says of a track's exported student. Raises UserError unless the figures in metrics/ are of that very file."""
    path, plan, choice = EXPORTED / track / "student.onnx", TRACKS[track], read_json(EXPORTED / track / "choice.json")
    files = f"detail/{track}.json", f"{track}_export.json", f"{track}_costs.json"
    detail, exported, costs = (read_json(METRICS / name) for name in files)
    student, content, entry = Student(path), path.read_bytes(), detail["models"][plan.distilled]
    refuse_folds(detail["dataset"].get("folds"), path, track)
    figures = exported["student"]
    of_this_file = choice["checkpoint_md5"] in entry["checkpoints"] and student.classes == detail["dataset"]["classes"]
    same_bytes = costs["models"]["student.onnx"]["file_bytes"] == len(content)
    if not (of_this_file and same_bytes and figures.get("temperature", 1) == student.temperature):
        raise UserError(f"{path}: the figures in {METRICS} are of another export: dvc repro report@{track}")
    seed = entry["checkpoints"].index(choice["checkpoint_md5"])
    of_seed = entry["figures"][seed]
    if student.temperature != 1:
        of_seed = of_seed | {name: of_seed[f"{name}_calibrated"] for name in ("nll", "ece")}
    name, main_verdict = detail["dataset"]["name"], next(iter(detail["comparisons"].items()))
    return {
        "track": track,
        "file": f"{track}.onnx",
        "content": content,
        "sha256": hashlib.sha256(content).hexdigest(),
        "student": student,
        "parameters": costs["models"][plan.distilled]["parameters"],
        "plan": plan,
        "seed": entry["seeds"][seed],
        "choice": choice,
        "detail": detail,
        "method": entry["parameters"].get("distill.method", "kd"),
        "recalls": {label: row["recall"] for label, row in entry["by_class"].items()},
        "figures": of_seed | {"accuracy": figures["accuracy"]},
        "verdict": sentence(*main_verdict),
        "table": Markup((METRICS / f"{track}.md").read_text("utf-8").strip()),  # noqa: S704 (results_table's)
        "data": about(name),
    }


def about(dataset: str) -> dict[str, str | None]:
    """Of a data set: `name`, `licence`, `description` and, if it is there, its name on Hugging Face's `hub`."""
    from medmnist import INFO

    if dataset in INFO:
        info = INFO[dataset]
        named = {"name": info["python_class"], "hub": "albertvillanova/medmnist-v2"}
        return named | {"licence": info["license"], "description": f'"{info["description"]}" (medmnist.com)'}
    unknown = {"name": dataset, "hub": None, "licence": "unknown", "description": ""}
    return DIGITS if dataset == "mnist" else unknown


def card(models: list[dict[str, Any]]) -> str:
    """The model card, Markdown behind YAML, of what `describe` says of each model."""
    results = []
    for model in models:
        data, figures = model["data"], model["figures"]
        name = model["detail"]["dataset"]["name"]
        metrics = [{"type": kind, "value": round(figures[figure], 4)} for figure, kind in FIGURES.items()]
        dataset = {"name": data["name"], "type": data["hub"] or name, "config": name, "split": "test"}
        task = {"type": "image-classification"}
        results.append({"name": model["track"], "results": [{"task": task, "dataset": dataset, "metrics": metrics}]})
    licences = [str(model["data"]["licence"]) for model in models]
    free = all(licence != "unknown" and "NC" not in licence for licence in licences)
    metadata = {
        "license": "apache-2.0" if free else "other",
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "onnx", "not-for-clinical-use"],
        "datasets": sorted({model["data"]["hub"] for model in models} - {None}),
        "metrics": ["accuracy", "roc_auc"],
        "model-index": results,
    }
    head = Markup(yaml.safe_dump(metadata, sort_keys=False))  # noqa: S704 (YAML)
    return tidy(template("markdown", "model_card").render(metadata=head, models=models))


if __name__ == "__main__":
    run(main)
