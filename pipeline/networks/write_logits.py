"""Write what checkpoints answer for every image of a prepared set: a file for `teacher.logits`; several are an ensemble.

    python -m pipeline.networks.write_logits data/distillation teacher.npz models/distillation/teacher/seed*.safetensors

A model of your own writes the same file: see docs/data.md, "A teacher from outside".
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.files import atomic_file
from pipeline.data.augmentation import FLIPS, check_augmentation, single_view, view_indices
from pipeline.data.dataset import SPLITS, load_dataset
from pipeline.data.prepared import load_split
from pipeline.networks.architectures import Classifier
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.inference import choose_device, ensemble, predict


def main(data: Path, out: Path, checkpoints: Sequence[Path], augmentation: str = "none", device: str = "auto") -> None:
    """Write `out`: logits, float32 (N, K), of each split's images, with `augmentation` (N, V, K) of those to train on.

    Raises UserError, before anything is computed, for a checkpoint of other classes or images than those in `data`.
    """
    if out.suffix != ".npz":
        raise UserError(f"{out}: the file to write, the second argument, ends in .npz")
    dataset, chosen = load_dataset(data), choose_device(device)
    check_augmentation(augmentation, dataset.name)
    if dataset.folds:
        raise UserError(f"{data}: of a cross-validation, in which every seed has other training images: set folds to null")
    models = []
    for path in checkpoints:
        model, description = load_checkpoint(path, chosen)
        theirs = description.dataset
        if (theirs.classes, theirs.image_shape) != (dataset.classes, dataset.image_shape):
            raise UserError(f"{path}: trained on other classes or another size of image ({theirs.name}) than {dataset.name}")
        models.append(model)
    indices = view_indices(augmentation, *dataset.image_shape[:2])
    arrays = {"fingerprint": np.array(dataset.fingerprint)}
    for split in SPLITS:
        images = load_split(data, split, chosen).images
        if len(images):
            arrays[f"{split}_logits"] = _answers(models, images, None if split != "train" else indices)
    labelled = dataset.images["train"]
    if "unlabelled" in dataset.images:
        arrays["train_logits"], arrays["unlabelled_logits"] = np.split(arrays["train_logits"], [labelled])
    with atomic_file(out) as file:
        np.savez(file, **arrays)
    print(f"{out}: {', '.join(f'{name} {array.shape}' for name, array in arrays.items() if array.ndim)}")


def _answers(models: Sequence[Classifier], images: torch.Tensor, indices: torch.Tensor | None) -> np.ndarray:
    """The models' logits as one's for images (N, H, W, C): float32 (N, K), for the V views of `indices` (N, V, K)."""
    if indices is None:
        return ensemble([predict(model, images) for model in models]).cpu().numpy()
    views = [single_view(number, indices.to(next(models[0].parameters()).device)) for number in range(len(indices))]
    answers = [ensemble([predict(model, images, transform=view) for model in models]).cpu() for view in views]
    return torch.stack(answers, dim=1).numpy()


def _options() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument(
        "data", metavar="DATA_FOLDER", type=Path, help="a prepared set, as dvc repro fetch_data@distillation makes it"
    )
    parser.add_argument("out", metavar="out.npz", type=Path, help="the file to write; it is replaced")
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="several: the mean of their probabilities"
    )
    parser.add_argument(
        "--augmentation", choices=tuple(FLIPS), default="none", help="as distillation.augmentation (default none)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser


if __name__ == "__main__":
    run(main, _options())
