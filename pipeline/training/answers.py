"""What a student learns from: what its teacher says of every training image, or a control in the place of that.

A control shows what of a gain is the teacher's knowledge: `permuted` keeps how the teacher answers, but not of which image of a
class; `hard` keeps the class that it names alone (pseudo-labels, Lee 2013); `uniform` keeps nothing: at a temperature of 1,
`kd` is then label smoothing (Yuan et al. 2020, arXiv:1909.11723).
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.data.augmentation import single_view
from pipeline.data.dataset import UNKNOWN, load_dataset
from pipeline.data.prepared import Split
from pipeline.networks.architectures import Classifier
from pipeline.networks.checkpoints import load_checkpoint
from pipeline.networks.inference import ensemble, predict
from pipeline.networks.outside import read_outside_logits

if TYPE_CHECKING:
    from pipeline.training.losses import Loss
    from pipeline.training.recipe import Recipe

CERTAIN = 1e6  # the logit of a class that is named for certain, at any temperature up to 1000


class Embeddings(nn.Module):
    """What the last linear layer of a classifier sees, float32 (B, D): returned, and kept in `last` whenever the classifier runs.

    Raises UserError if it has no linear layer.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier, self.last = classifier, None
        linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"{type(classifier.network).__name__} has no linear layer, whose input distill.method: rkd compares")
        linear[-1].register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.last = inputs[0].float()

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of uint8 images (B, H, W, C)."""
        self.classifier(images)
        return self.last


def with_own_embeddings(loss: "Loss", student: Classifier) -> "Loss":
    """`loss` of a method in losses.ON_EMBEDDINGS as a loss for `loop.fit`: it gets the student's embeddings of the last batch."""
    embeddings = Embeddings(student)
    return lambda *arguments: loss(*arguments, embeddings.last)


def answers(recipe: "Recipe", device: torch.device, train: Split, indices: Tensor | None, of_embeddings: bool) -> Tensor:
    """What the student of `recipe` learns from, float32, on `device`: the rows (N, K) of the images of `train`, or (N, D).

    `indices`: the views of an image, as in augmentation.view_indices: then N * V rows, image by image. `of_embeddings`: whether
    the method is one of losses.ON_EMBEDDINGS; else the answers are logits, of several teachers the logarithm of the mean of their
    probabilities.
    """
    transforms = [None] if indices is None else [single_view(number, indices) for number in range(len(indices))]
    by_teacher = []
    for path in recipe.teachers:
        if path.suffix == ".npz":
            logits = torch.tensor(read_outside_logits(path, "train", load_dataset(recipe.data)))
            if logits.shape[1:-1] != (() if indices is None else (len(indices),)):
                raise UserError(f"{path}: not the views of augmentation = {recipe.augmentation}: run dvc repro")
            by_teacher.append(logits.flatten(0, -2).to(device))
            continue
        teacher, _ = load_checkpoint(path, device)
        model = Embeddings(teacher) if of_embeddings else teacher
        views = [predict(model, train.images, recipe.settings["precision"], transform) for transform in transforms]
        by_teacher.append(torch.stack(views, dim=1).flatten(0, 1))
    outputs = ensemble(by_teacher)
    match recipe.answers:
        case "permuted":
            return permuted(outputs, train.labels, recipe.seed)
        case "uniform":
            return torch.zeros_like(outputs)
        case "hard":
            return CERTAIN * F.one_hot(outputs.argmax(1), outputs.shape[1]).float()
        case _:
            return outputs


def permuted(outputs: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The rows of `outputs`, one or, image by image, several for each of `labels` (N,), exchanged among the images of a class.

    An image without a label counts to the class that its first row names.
    """
    images = outputs.unflatten(0, (len(labels), -1))
    classes = torch.where(labels == UNKNOWN, images[:, 0].argmax(1), labels)
    generator, source = torch.Generator().manual_seed(seed), torch.arange(len(labels), device=outputs.device)
    for label in classes.unique():
        members = (classes == label).nonzero()[:, 0]
        source[members] = members[torch.randperm(len(members), generator=generator).to(outputs.device)]
    return images[source].flatten(0, 1)
