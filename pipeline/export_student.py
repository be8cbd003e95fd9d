"""Stage export_student: write a track's best distilled student as ONNX files into models/exported/<track>/.

The best of the seeds is decided on the validation images. The int8 version stays if it names the same class as the float32 one
often enough, on the training and validation images together: a bound on its accuracy would loosen where there are few images.
Both give probabilities at the temperature that fits the validation images, if there are any.

Beside them lies, to compare with, the best of the teacher's seeds, exported and quantized likewise: what does int8 make of the
big network? It stays however often its two versions agree; evaluate_export says how often.
"""

from pathlib import Path

import numpy as np
import torch

from pipeline.core.cli import run
from pipeline.core.errors import UserError, is_disk_full, one_line
from pipeline.core.files import atomic_folder, md5, write_atomic, write_json
from pipeline.data.prepared import load_training_data
from pipeline.evaluation.calibration import fit_temperature
from pipeline.export.onnx_export import export_onnx, quantize
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.description import checkpoints_in, read_description
from pipeline.networks.inference import predict
from pipeline.networks.outside import outside_in
from pipeline.params import TRACKS, load_params

AGREEMENT = 0.995  # share of the images that float32 and int8 must name the same class of
# How MedMNIST made square images of others, as `medmnist.INFO` describes it. Its filter was another.
MEDMNIST_RESIZE = {"dermamnist": "stretch", "octmnist": "crop", "pneumoniamnist": "crop", "retinamnist": "crop"}


def main(track: str) -> None:
    threads, cpu, plan = load_params().threads, torch.device("cpu"), TRACKS[track]
    torch.set_num_threads(threads)
    best = best_in(Path("models") / track / plan.distilled)
    classifier, description = load_checkpoint(best, cpu)
    dataset, train, val = load_training_data(Path("data") / track, cpu, description.seed)
    labels = val.labels.numpy()
    temperature = 1.0
    if len(labels):
        temperature = fit_temperature(labels, predict(classifier, val.images).double().softmax(dim=1).numpy())
    with atomic_folder(Path("models/exported") / track) as folder:
        float32, int8 = folder / "student.onnx", folder / "student_int8.onnx"
        write_atomic(folder / "student.safetensors", best.read_bytes())
        resize = dataset.resize or MEDMNIST_RESIZE.get(dataset.name)
        export_onnx(classifier, dataset.image_shape, dataset.classes, float32, resize, temperature)
        quantize(float32, train.images[:1000].numpy(), int8)
        both = [Student(path, threads) for path in (float32, int8)]
        parts = [part.images.numpy() for part in (val, train) if len(part.labels)]
        named = [[student.probabilities(images).argmax(1) for images in parts] for student in both]
        agreement = float(np.mean(np.concatenate(named[0]) == np.concatenate(named[1])))
        if agreement < AGREEMENT:
            int8.unlink()
        accuracies = [float((of_parts[0] == labels).mean()) if len(labels) else None for of_parts in named]
        choice = {
            "checkpoint": best.name,
            "checkpoint_md5": md5(best),
            "validation_images": len(labels),
            "validation_accuracy": accuracies[0],
            "validation_accuracy_int8": accuracies[1],
            "temperature": temperature,
            "int8_agreement": agreement,
            "int8_at_least": AGREEMENT,
            "int8_kept": int8.exists(),
            "teacher": export_teacher(Path("models") / track / plan.teacher, Path("data") / track, folder),
        }
        write_json(folder / "choice.json", choice)
    verdict = "kept" if choice["int8_kept"] else "not kept"
    shown = "validation accuracy {:.4f}, int8 {:.4f}, ".format(*accuracies) if len(labels) else ""
    print(f"{best.name}: temperature {temperature:.3f}, {shown}int8 names the same class {agreement:.2%}: {verdict}")
    if "reason" in choice["teacher"]:
        print(f"{plan.teacher}: not exported: {choice['teacher']['reason']}")


def best_in(folder: Path) -> Path:
    """The checkpoint of the seed that is best on the validation images, of the first in a cross-validation. Raises UserError."""
    paths = checkpoints_in(folder)
    if read_description(paths[0]).dataset.folds:
        return paths[0]
    return max(paths, key=lambda path: read_description(path).best())


def export_teacher(source: Path, data: Path, folder: Path) -> dict[str, str | int]:
    """Write the best checkpoint in `source` into `folder`: teacher.onnx and, its ranges from training images, teacher_int8.onnx.

    `data` is the prepared set that it was trained on. Returns `checkpoint`, its name, `checkpoint_md5` and `seed`. Of a teacher
    from outside and of a network that PyTorch or the project's ONNX files have no operators for, the `reason` why there are none.
    """
    if outside_in(source):
        return {"reason": "a teacher from outside is a file of what it says, not a network"}
    best, cpu = best_in(source), torch.device("cpu")
    classifier, description = load_checkpoint(best, cpu)
    dataset, train, _ = load_training_data(data, cpu, description.seed)
    float32 = folder / "teacher.onnx"
    try:
        export_onnx(classifier, dataset.image_shape, dataset.classes, float32)
        quantize(float32, train.images[:1000].numpy(), folder / "teacher_int8.onnx")
    except MemoryError:
        raise
    except Exception as error:  # of a dozen types
        if is_disk_full(error):
            raise
        float32.unlink(missing_ok=True)
        reason = one_line(error) if isinstance(error, UserError) else type(error).__name__  # whose text names places
        return {"reason": f"{description.architecture} cannot be exported: {reason}"}
    return {"checkpoint": best.name, "checkpoint_md5": md5(best), "seed": description.seed}


if __name__ == "__main__":
    run(main, track=tuple(TRACKS))
