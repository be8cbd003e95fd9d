"""Stage evaluate_export: hold the exported student against the PyTorch model on the whole test split."""

from pathlib import Path

import numpy as np
import torch

from pipeline.networks.checkpoints import load_checkpoint
from pipeline.data.prepared import load_split
from pipeline.export.onnx_export import predict_onnx
from pipeline.core.cli import run
from pipeline.core.files import write_json
from pipeline.networks.inference import predict

STUDENT = Path("models/student")


def main() -> None:
    cpu = torch.device("cpu")
    test = load_split(Path("data/distillation"), "test", cpu)
    labels = test.labels.numpy()
    classifier, _ = load_checkpoint(STUDENT / "student.safetensors", cpu)
    expected = torch.softmax(predict(classifier, test.images), dim=1).numpy()
    results = {"pytorch": {"accuracy": float((expected.argmax(1) == labels).mean())}}
    for path in sorted(STUDENT.glob("*.onnx")):
        found = predict_onnx(path, test.images.numpy())
        results[path.stem] = {
            "accuracy": float((found.argmax(1) == labels).mean()),
            "largest_difference": float(np.abs(found - expected).max()),  # of a probability
            "same_predictions": float((found.argmax(1) == expected.argmax(1)).mean()),  # share of the images
        }
    write_json(Path("metrics/export.json"), results)
    for name, figures in results.items():
        print(name, {key: round(value, 6) for key, value in figures.items()})


if __name__ == "__main__":
    run(main)
