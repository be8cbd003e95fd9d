"""The losses of knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.labels import UNKNOWN


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened distributions, mean over the batch, in nats.

    Its gradient is that of Hinton et al.'s cross-entropy with soft targets (section 2). Logits have shape (N, K).
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher): as `forward_kl` with the two distributions exchanged."""
    return forward_kl(teacher_logits, student_logits, temperature)


class DistillationLoss(nn.Module):
    """alpha * CE(labels) + (1 - alpha) * T^2 * KL.

    T^2 keeps the two terms' gradients in proportion when the temperature changes (Hinton et al. 2015, section 2). With
    alpha = 1 it is the cross-entropy and nothing else, to the bit. An image whose label is UNKNOWN has the teacher's term only;
    both terms are means over the whole batch.

    Parameters
    ----------
    temperature : float > 0
    alpha : float in 0..1
        Weight of the hard labels.
    divergence : "forward" for KL(teacher || student), "reverse" for KL(student || teacher)
    """

    def __init__(self, temperature: float, alpha: float, divergence: str) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.divergence = {"forward": forward_kl, "reverse": reverse_kl}[divergence]

    def forward(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar loss from logits (N, K), labels int64 (N,) and teacher logits (N, K)."""
        hard = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum") / len(labels)
        if self.alpha == 1:
            return hard
        soft = self.divergence(logits, teacher_logits, self.temperature) * self.temperature**2
        return self.alpha * hard + (1 - self.alpha) * soft
