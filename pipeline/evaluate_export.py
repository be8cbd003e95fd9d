"""Stage evaluate_export: measure a track's exported models on their test images, and what export and int8 change.

A student's files are held against its checkpoint in PyTorch, the teacher's int8 file against its float32 one.
"""

from pathlib import Path

import numpy as np
import torch

from pipeline.core.cli import run
from pipeline.core.files import read_json, write_json
from pipeline.data.prepared import load_evaluation_data, take
from pipeline.evaluation.jackknife import FIGURES
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.inference import predict
from pipeline.params import TRACKS, load_params


def main(track: str) -> None:
    folder, threads, cpu = Path("models/exported") / track, load_params().threads, torch.device("cpu")
    torch.set_num_threads(threads)
    data, teacher = load_evaluation_data(Path("data") / track, cpu), read_json(folder / "choice.json")["teacher"]
    classifier, description = load_checkpoint(folder / "student.safetensors", cpu)
    test = take(data.test, data.rows("test", description.seed))
    logits, images, labels = predict(classifier, test.images), test.images.numpy(), test.labels.numpy()
    results = {"pytorch": measure(labels, logits.softmax(dim=1).numpy())}
    for path in sorted(folder.glob("student*.onnx")):
        opened = Student(path, threads)
        expected = (logits / opened.temperature).softmax(dim=1).numpy()
        results[path.stem] = measure(labels, opened.probabilities(images), expected) | {"temperature": opened.temperature}
    if "reason" in teacher:
        results["no_teacher"] = teacher["reason"]
    else:
        images, labels = (part.numpy() for part in take(data.test, data.rows("test", teacher["seed"])))
        float32, int8 = (Student(folder / name, threads).probabilities(images) for name in ("teacher.onnx", "teacher_int8.onnx"))
        results |= {"teacher": measure(labels, float32), "teacher_int8": measure(labels, int8, float32)}
    write_json(Path(f"metrics/{track}_export.json"), results)
    for name, figures in results.items():
        if name != "no_teacher":
            same = f", the same class for {100 * figures['same_predictions']:.2f} %" if "same_predictions" in figures else ""
            print(f"{name}: test accuracy {100 * figures['accuracy']:.2f} %, AUC {figures['auc']:.4f}{same}")


def measure(labels: np.ndarray, probabilities: np.ndarray, expected: np.ndarray | None = None) -> dict[str, float]:
    """The figures of `jackknife.FIGURES` of probabilities (N, K), and how they differ from those `expected` before a change.

    `largest_difference`: of a probability; `same_predictions`: share of the images, 0-1, of which both name the same class.
    """
    figures = {name: figure(labels, probabilities)[0] for name, figure in FIGURES.items()}
    if expected is None:
        return figures
    same = float((probabilities.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return figures | {"largest_difference": float(np.abs(probabilities - expected).max()), "same_predictions": same}


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
