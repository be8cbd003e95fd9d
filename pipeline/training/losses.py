"""The losses: one function a method, each returning a callable (logits, labels, *targets) -> its terms by name.

Logits are float32 (B, K), labels int64 (B,); the terms are scalars, means over the batch in nats, whose sum is minimised.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import UNKNOWN

Loss = Callable[..., Mapping[str, Tensor]]


def hard_labels(smoothing: float = 0.0, weights: Tensor | None = None, share: float = 1.0) -> Loss:
    """Cross-entropy with the labels: the term `hard`. An image whose label is UNKNOWN adds nothing.

    `smoothing`, 0-1, is spread over all classes (Szegedy et al. 2016, section 7); `weights`, float32 (K,), are of the classes.
    `share`, 0-1, is that of the training images that have a label: the term is the sum over the batch's labelled images divided
    by as many as it has on average, so that its weight does not depend on how many images have none.
    """

    def loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        options = {"weight": weights, "ignore_index": UNKNOWN, "label_smoothing": smoothing, "reduction": "sum"}
        return {"hard": F.cross_entropy(logits, labels, **options) / (len(labels) * share)}

    return loss


def distillation(hard: Loss, temperature: float, alpha: float, divergence: str) -> Loss:
    """Knowledge distillation: alpha * CE(labels), the term `hard`, + (1 - alpha) * T^2 * KL, the term `soft`.

    T^2 keeps the two terms' gradients in proportion when the temperature changes (Hinton, Vinyals and Dean 2015,
    arXiv:1503.02531, section 2). With alpha = 1 it is the cross-entropy and nothing else, to the bit. An image whose label is
    UNKNOWN has the teacher's term only. The callable takes the teacher's logits (B, K) after the labels.

    `hard` as from `hard_labels`; `temperature` > 0; `alpha` in 0..1; `divergence` "forward" for KL(teacher || student), "reverse"
    for KL(student || teacher).
    """
    kl = {"forward": forward_kl, "reverse": reverse_kl}[divergence]

    def loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
        terms = hard(logits, labels)
        if alpha == 1:
            return terms
        soft = kl(logits, teacher_logits, temperature) * temperature**2
        return {"hard": alpha * terms["hard"], "soft": (1 - alpha) * soft}

    return loss


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the distributions softened by the temperature, mean over the batch.

    Its gradient is that of Hinton et al.'s cross-entropy with soft targets (section 2).
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher): as `forward_kl` with the two distributions exchanged."""
    return forward_kl(teacher_logits, student_logits, temperature)
