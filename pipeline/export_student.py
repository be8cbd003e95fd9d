"""Stage export_student: write the best distilled student as ONNX files into models/student/.

The best of the seeds and whether its int8 version is good enough are decided on the validation images.
"""

from pathlib import Path

import torch

from pipeline.networks.description import checkpoints_in
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.data.prepared import load_training_data
from pipeline.export.onnx_export import export_onnx, predict_onnx, quantize
from pipeline.core.cli import run
from pipeline.evaluation.statistics import share_interval
from pipeline.core.files import atomic_folder, md5, write_json, write_atomic

CALIBRATION_IMAGES = 1000


def main() -> None:
    cpu = torch.device("cpu")
    data = load_training_data(Path("data/distillation"), cpu)
    classes, shape = data.dataset.classes, data.dataset.image_shape
    loaded = {
        path: load_checkpoint(path, cpu) for path in checkpoints_in(Path("models/distillation/student_distilled"))
    }
    best = max(loaded, key=lambda path: loaded[path][1].best())
    labels = data.val.labels.numpy()
    with atomic_folder(Path("models/student")) as folder:
        write_atomic(folder / "student.safetensors", best.read_bytes())
        export_onnx(loaded[best][0], shape, classes, folder / "student.onnx")
        quantize(folder / "student.onnx", data.train.images[:CALIBRATION_IMAGES].numpy(), classes, folder / "int8.onnx")
        right = {
            name: int((predict_onnx(folder / f"{name}.onnx", data.val.images.numpy()).argmax(1) == labels).sum())
            for name in ("student", "int8")
        }
        least, _ = share_interval(right["student"], len(labels))
        keeps = right["int8"] / len(labels) >= least
        if keeps:
            (folder / "int8.onnx").rename(folder / "student_int8.onnx")
        else:
            (folder / "int8.onnx").unlink()
        choice = {
            "checkpoint": best.name,
            "checkpoint_md5": md5(best),
            "validation_images": len(labels),
            "validation_accuracy": right["student"] / len(labels),
            "validation_accuracy_int8": right["int8"] / len(labels),
            "int8_at_least": least,
            "int8_kept": keeps,
        }
        write_json(folder / "choice.json", choice)
    print(
        f"{best.name}: validation accuracy {choice['validation_accuracy']:.4f}, int8"
        f" {choice['validation_accuracy_int8']:.4f}, {'kept' if keeps else 'not kept'}"
    )


if __name__ == "__main__":
    run(main)
