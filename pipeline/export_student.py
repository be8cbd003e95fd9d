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


def main() -> None:
    threads, cpu = load_params().threads, torch.device("cpu")
    torch.set_num_threads(threads)
    dataset, train, val = load_training_data(Path("data/distillation"), cpu)
    best = max(checkpoints_in(Path("models/distillation/student_distilled")), key=lambda path: read_description(path).best())
    with atomic_folder(Path("models/student")) as folder:
        float32, int8 = folder / "student.onnx", folder / "student_int8.onnx"
        write_atomic(folder / "student.safetensors", best.read_bytes())
        export_onnx(load_checkpoint(best, cpu)[0], dataset.image_shape, dataset.classes, float32)
        quantize(float32, train.images[:1000].numpy(), dataset.classes, int8)
        images, labels = val.images.numpy(), val.labels.numpy()
        correct = [int((Student(path, threads).probabilities(images).argmax(1) == labels).sum()) for path in (float32, int8)]
        accuracy, accuracy_int8 = (count / len(labels) for count in correct)
        # The int8 version may be worse only within the 95 % interval (Wilson's) of the float32 version's accuracy.
        floor = float(binomtest(correct[0], len(labels)).proportion_ci(0.95, method="wilson").low)
        if accuracy_int8 < floor:
            int8.unlink()
        choice = {
            "checkpoint": best.name,
            "checkpoint_md5": md5(best),
            "validation_images": len(labels),
            "validation_accuracy": accuracy,
            "validation_accuracy_int8": accuracy_int8,
            "int8_at_least": floor,
            "int8_kept": int8.exists(),
        }
        write_json(folder / "choice.json", choice)
    verdict = "kept" if choice["int8_kept"] else "not kept"
    print(f"{best.name}: validation accuracy {accuracy:.4f}, int8 {accuracy_int8:.4f}, {verdict}")


if __name__ == "__main__":
    run(main)
