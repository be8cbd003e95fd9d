"""Stage export_student: write the best distilled student as ONNX files into models/student/.

The best of the seeds, and whether its int8 version is good enough, are decided on the validation images.
"""

from pathlib import Path

import torch
from scipy.stats import binomtest

from pipeline.core.cli import run
from pipeline.core.files import atomic_folder, md5, write_atomic, write_json
from pipeline.data.prepared import load_training_data
from pipeline.export.onnx_export import export_onnx, quantize
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import checkpoints_in, read_description
from pipeline.params import load_params

CALIBRATION_IMAGES = 1000


def main() -> None:
    threads = load_params().threads
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    data = load_training_data(Path("data/distillation"), cpu)
    images, labels, classes = data.val.images.numpy(), data.val.labels.numpy(), data.dataset.classes
    checkpoints = checkpoints_in(Path("models/distillation/student_distilled"))
    best = max(checkpoints, key=lambda path: read_description(path).best())
    with atomic_folder(Path("models/student")) as folder:
        student, int8 = folder / "student.onnx", folder / "student_int8.onnx"
        write_atomic(folder / "student.safetensors", best.read_bytes())
        export_onnx(load_checkpoint(best, cpu)[0], data.dataset.image_shape, classes, student)
        quantize(student, data.train.images[:CALIBRATION_IMAGES].numpy(), classes, int8)
        correct, correct_int8 = (
            int((Student(path, threads).probabilities(images).argmax(axis=1) == labels).sum()) for path in (student, int8)
        )
        # The int8 version may be worse only within the 95 % interval (Wilson's) of the float32 version's accuracy.
        floor = float(binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson").low)
        accurate = correct_int8 / len(labels) >= floor
        if not accurate:
            int8.unlink()
        choice = {
            "checkpoint": best.name,
            "checkpoint_md5": md5(best),
            "validation_images": len(labels),
            "validation_accuracy": correct / len(labels),
            "validation_accuracy_int8": correct_int8 / len(labels),
            "int8_at_least": floor,
            "int8_kept": accurate,
        }
        write_json(folder / "choice.json", choice)
    accuracies = f"{choice['validation_accuracy']:.4f}, int8 {choice['validation_accuracy_int8']:.4f}"
    print(f"{best.name}: validation accuracy {accuracies}, {'kept' if accurate else 'not kept'}")


if __name__ == "__main__":
    run(main)
