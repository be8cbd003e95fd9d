"""The losses: one function a method, each returning a callable (logits, labels, done, *targets) -> its terms by name.

Logits are float32 (B, K), labels int64 (B,), `done` a float32 scalar: the epochs begun as a share of all, 0-1. Targets are rows
of what the teacher says of each image: its logits (B, K) or, for the methods in ON_EMBEDDINGS, what its last linear layer sees
(B, D), and after it the student's own (B, D'). The terms are scalars, means over the batch, whose sum is minimised. A method
takes `hard`, as from `hard_labels`, and its parameters as in params.yaml.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import UNKNOWN

Loss = Callable[..., Mapping[str, Tensor]]
TINY = 1e-8
NEVER = -1e30  # the logit of a class that is left out: with an infinite one, 0 * log 0 would be no number


def hard_labels(smoothing: float = 0.0, weights: Tensor | None = None, share: float = 1.0) -> Loss:
    """Cross-entropy with the labels: the term `hard`. An image whose label is UNKNOWN adds nothing.

    `smoothing`, 0-1, is spread over all classes (Szegedy et al. 2016, section 7); `weights`, float32 (K,), are of the classes.
    `share`, 0-1, is that of the training images that have a label: the term is the sum over the batch's labelled images divided
    by as many as it has on average, so that its weight does not depend on how many images have none.
    """

    def loss(logits: Tensor, labels: Tensor, done: Tensor) -> dict[str, Tensor]:
        options = {"weight": weights, "ignore_index": UNKNOWN, "label_smoothing": smoothing, "reduction": "sum"}
        return {"hard": F.cross_entropy(logits, labels, **options) / (len(labels) * share)}

    return loss


def kd(hard: Loss, temperature: float, alpha: float, divergence: str, logit_standardization: bool = False) -> Loss:
    """Knowledge distillation: alpha * CE(labels), the term `hard`, + (1 - alpha) * T^2 * KL, the term `soft`.

    T^2 keeps the two terms' gradients in proportion when the temperature changes (Hinton, Vinyals and Dean 2015,
    arXiv:1503.02531, section 2). With alpha = 1 it is the cross-entropy and nothing else, to the bit.

    `divergence` "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
    """
    kl = {"forward": forward_kl, "reverse": reverse_kl}[divergence]

    def loss(logits: Tensor, labels: Tensor, done: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        terms = hard(logits, labels, done)
        if alpha == 1:
            return terms
        if logit_standardization:
            logits, teacher = standardized(logits), standardized(teacher)
        return {"hard": alpha * terms["hard"], "soft": (1 - alpha) * kl(logits, teacher, temperature) * temperature**2}

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


def standardized(logits: Tensor) -> Tensor:
    """Each image's logits with mean 0 and standard deviation 1 (Sun et al. 2024, arXiv:2403.01427, section 4)."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def dkd(
    hard: Loss, weight: float, alpha: float, beta: float, temperature: float, warm_up: float, logit_standardization: bool
) -> Loss:
    """Decoupled distillation: weight * CE + w * T^2 * (alpha * TCKD + beta * NCKD): Zhao et al. 2022, arXiv:2203.08679, eq. 7.

    The terms are `target` and `non_target`. w grows linearly from 0 to 1 over the share `warm_up` of the epochs. Every image has
    a label, and there are three classes or more: with two, NCKD is 0 and this is alpha times `kd`'s soft term.
    """

    def loss(logits: Tensor, labels: Tensor, done: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        terms = hard(logits, labels, done)
        if logit_standardization:
            logits, teacher = standardized(logits), standardized(teacher)
        target, non_target, _ = decoupled(logits / temperature, teacher / temperature, labels)
        factor = temperature**2 * (done / warm_up).clamp(max=1) if warm_up else temperature**2
        soft = {"target": factor * alpha * target.mean(), "non_target": factor * beta * non_target.mean()}
        return {"hard": weight * terms["hard"]} | soft

    return loss


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TCKD and NCKD of each image, (B,), and the teacher's probability of the other classes: KL = TCKD + that * NCKD (section 3).

    `student` and `teacher` are logits divided by the temperature. TCKD is the divergence of (this class, any other), NCKD that
    among the other classes.
    """
    # One-hot, not gather, whose deterministic backward pass cannot be captured on CUDA.
    is_label = F.one_hot(labels, student.shape[1]).bool()
    pairs, others = [], []
    for logits in (teacher, student):
        without = logits.masked_fill(is_label, NEVER)
        others.append(F.log_softmax(without, dim=1))
        pairs.append(F.log_softmax(torch.stack([logits.masked_fill(~is_label, 0).sum(1), without.logsumexp(1)], dim=1), dim=1))
    target, non_target = ((p.exp() * (p - q)).sum(1) for p, q in (pairs, others))
    return target, non_target, pairs[0][:, 1].exp()


def dist(hard: Loss, weight: float, beta: float, gamma: float, temperature: float) -> Loss:
    """Matching correlations instead of probabilities: weight * CE + T^2 * (beta * inter + gamma * intra).

    `inter` is 1 - Pearson's correlation of student and teacher over the classes, mean over the images; `intra` that over the
    batch's images, mean over the classes (Huang et al. 2022, arXiv:2205.10536, section 4). For two classes `inter` is left
    out: their correlation is 1 or -1.
    """

    def loss(logits: Tensor, labels: Tensor, done: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        student, teacher = ((values / temperature).softmax(dim=1) for values in (logits, teacher))
        terms = {"hard": weight * hard(logits, labels, done)["hard"]}
        if logits.shape[1] > 2:
            terms["inter"] = beta * temperature**2 * (1 - correlation(student, teacher).mean())
        return terms | {"intra": gamma * temperature**2 * (1 - correlation(student.T, teacher.T).mean())}

    return loss


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's of each row; 0 where one is constant."""
    a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + TINY)


def wttm(hard: Loss, weight: float, beta: float, gamma: float) -> Loss:
    """Weighted transformed teacher matching: weight * CE + beta * mean(U * KL(p^gamma / U || q)), U = sum(p^gamma).

    p is the teacher's distribution, q the student's, at a temperature of 1: gamma is 1 / T for the teacher alone (Zheng and Yang
    2024, arXiv:2402.11148, algorithm 1). With gamma = 1 it is KL at T = 1.
    """

    def loss(logits: Tensor, labels: Tensor, done: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        powers = gamma * F.log_softmax(teacher, dim=1)
        divergence = F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(powers, dim=1), reduction="none", log_target=True)
        soft = beta * (powers.exp().sum(1) * divergence.sum(1)).mean()
        return {"hard": weight * hard(logits, labels, done)["hard"], "soft": soft}

    return loss


def rkd(hard: Loss, weight: float, distance: float, angle: float) -> Loss:
    """Relational distillation: weight * CE + distance * L_D + angle * L_A (Park et al. 2019, arXiv:1904.05068, section 3.2).

    L_D compares the batch's pairwise distances, each divided by their mean, L_A the cosines of its triplets' angles, both by
    Huber's loss. They are of what the last linear layers see. Memory grows with the batch's cube.
    """

    def loss(logits: Tensor, labels: Tensor, done: Tensor, teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
        distances, angles = ([of(values) for values in (student, teacher)] for of in (relative_distances, cosines))
        terms = {"hard": weight * hard(logits, labels, done)["hard"]}
        return terms | {"distance": distance * F.smooth_l1_loss(*distances), "angle": angle * F.smooth_l1_loss(*angles)}

    return loss


def relative_distances(points: Tensor) -> Tensor:
    """Euclidean distances (B, B) of points (B, D), divided by the mean of those that are not zero."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / (distances > 0).sum().clamp(min=1)).clamp(min=TINY)


def cosines(points: Tensor) -> Tensor:
    """Of the angle at each point between every two others, (B, B, B); 0 where two of the three are equal."""
    directions = F.normalize(points[None] - points[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


METHODS = {"kd": kd, "dkd": dkd, "dist": dist, "wttm": wttm, "rkd": rkd}
ON_EMBEDDINGS = ("rkd",)
