"""Stage evaluate_export: compare a track's exported student with the PyTorch model on its test images."""

from pathlib import Path

import numpy as np
import torch

from pipeline.core.cli import run
from pipeline.core.files import write_json
from pipeline.data.prepared import load_test_data, take
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.inference import predict
from pipeline.params import TRACKS, load_params


def main(track: str) -> None:
    student, threads, cpu = Path("models/exported") / track, load_params().threads, torch.device("cpu")
    torch.set_num_threads(threads)
    classifier, description = load_checkpoint(student / "student.safetensors", cpu)
    data = load_test_data(Path("data") / track, cpu)
    images, labels = take(data.test, data.rows("test", description.seed))
    logits = predict(classifier, images)
    results = {"pytorch": {"accuracy": float((logits.argmax(dim=1) == labels).double().mean())}}
    for path in sorted(student.glob("*.onnx")):
        opened = Student(path, threads)
        exported = opened.probabilities(images.numpy())
        expected = (logits / opened.temperature).softmax(dim=1).numpy()
        results[path.stem] = {
            "accuracy": float((exported.argmax(axis=1) == labels.numpy()).mean()),
            "largest_difference": float(np.abs(exported - expected).max()),  # of a probability
            "temperature": opened.temperature,  # of these probabilities
            "same_predictions": float((exported.argmax(axis=1) == expected.argmax(axis=1)).mean()),  # share of the images
        }
    write_json(Path(f"metrics/{track}_export.json"), results)
    for name, figures in results.items():
        same = f", the class of PyTorch for {100 * figures['same_predictions']:.2f} %" if "same_predictions" in figures else ""
        print(f"{name}: test accuracy {100 * figures['accuracy']:.2f} %{same}")


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
