"""Stage evaluate_export: compare the exported student with the PyTorch model on the whole test split."""

from pathlib import Path

import numpy as np
import torch

from pipeline.core.cli import run
from pipeline.core.files import write_json
from pipeline.data.prepared import load_split
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.inference import predict
from pipeline.params import load_params

STUDENT = Path("models/student")


def main() -> None:
    threads = load_params().threads
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    test = load_split(Path("data/distillation"), "test", cpu)
    labels = test.labels.numpy()
    classifier, _ = load_checkpoint(STUDENT / "student.safetensors", cpu)
    expected = predict(classifier, test.images).softmax(dim=1).numpy()
    results = {"pytorch": {"accuracy": float((expected.argmax(axis=1) == labels).mean())}}
    for path in sorted(STUDENT.glob("*.onnx")):
        exported = Student(path, threads).probabilities(test.images.numpy())
        results[path.stem] = {
            "accuracy": float((exported.argmax(axis=1) == labels).mean()),
            "largest_difference": float(np.abs(exported - expected).max()),  # of a probability
            "same_predictions": float((exported.argmax(axis=1) == expected.argmax(axis=1)).mean()),  # share of the images
        }
    write_json(Path("metrics/export.json"), results)
    for name, figures in results.items():
        print(name, {key: round(value, 6) for key, value in figures.items()})


if __name__ == "__main__":
    run(main)
