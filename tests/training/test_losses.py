import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import entropy

from pipeline.data.labels import UNKNOWN
from pipeline.training.losses import METHODS, cosines, decoupled, forward_kl, hard_labels, kd

DONE = torch.tensor(1.0)  # the last epoch


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 10, (8,), generator=generator), teacher


def total(terms):
    return sum(terms.values())


def test_an_image_without_a_label_has_the_teachers_term_alone(batch):
    logits, labels, teacher = batch
    hidden = torch.where(torch.arange(8) < 3, labels, UNKNOWN)
    labelled = F.cross_entropy(logits[:3], labels[:3], reduction="sum") / 8
    expected = 0.7 * labelled + 0.3 * 25 * forward_kl(logits, teacher, 5.0)
    torch.testing.assert_close(total(kd(hard_labels(), 5.0, 0.7, "forward")(logits, hidden, DONE, teacher)), expected)
    none = total(kd(hard_labels(), 5.0, 0.7, "forward")(logits, torch.full_like(labels, UNKNOWN), DONE, teacher))
    torch.testing.assert_close(none, 0.3 * 25 * forward_kl(logits, teacher, 5.0))


def test_alpha_one_is_cross_entropy_to_the_bit_whatever_the_teacher_says(batch):
    logits, labels, teacher = batch
    terms = kd(hard_labels(), 5.0, 1.0, "forward")(logits, labels, DONE, teacher * float("inf"))
    assert list(terms) == ["hard"]
    assert terms["hard"].item() == hard_labels()(logits, labels, DONE)["hard"].item()
    assert terms["hard"].item() == F.cross_entropy(logits, labels).item()


def test_the_hard_terms_weight_does_not_depend_on_how_many_images_have_a_label(batch):
    logits, labels, _ = batch
    hidden = torch.where(torch.arange(8) < 2, labels, UNKNOWN)
    term = hard_labels(share=0.25)(logits, hidden, DONE)["hard"]
    torch.testing.assert_close(term, F.cross_entropy(logits[:2], labels[:2]))


def test_smoothing_and_weights_are_those_of_the_formula(batch):
    logits, labels, _ = batch
    weights = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    log_q = F.log_softmax(logits, dim=1)
    smooth = F.one_hot(labels, 10) * 0.9 + 0.1 / 10
    torch.testing.assert_close(hard_labels(0.1)(logits, labels, DONE)["hard"], -(smooth * log_q).sum(1).mean())
    torch.testing.assert_close(
        hard_labels(weights=weights)(logits, labels, DONE)["hard"], -(weights * F.one_hot(labels, 10) * log_q).sum(1).mean()
    )


kl_divergence = functools.partial(entropy, axis=-1)


def kd_by_hand(z, labels, t, divergence: str) -> dict[str, float]:
    teacher, student = softmax(t / 5, axis=1), softmax(z / 5, axis=1)
    of, to = (teacher, student) if divergence == "forward" else (student, teacher)
    return {"soft": 0.5 * 25 * np.mean(kl_divergence(of, to))}


def dkd_by_hand(z, labels, t, temperature: float) -> dict[str, float]:
    p, q = softmax(t / temperature, axis=1), softmax(z / temperature, axis=1)
    target, others = [], []
    for a, b, label in zip(p, q, labels, strict=True):
        target.append(kl_divergence([a[label], 1 - a[label]], [b[label], 1 - b[label]]))
        a, b = np.delete(a, label), np.delete(b, label)
        others.append(kl_divergence(a / a.sum(), b / b.sum()))
    return {"target": temperature**2 * np.mean(target), "non_target": 8 * temperature**2 * np.mean(others)}


def dist_by_hand(z, labels, t, temperature: float) -> dict[str, float]:
    p, q = softmax(t / temperature, axis=1), softmax(z / temperature, axis=1)
    inter = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return {"inter": 2 * temperature**2 * (1 - inter), "intra": 3 * temperature**2 * (1 - intra)}


def wttm_by_hand(z, labels, t, gamma: float) -> dict[str, float]:
    powers = softmax(t, axis=1) ** gamma
    sums = powers.sum(axis=1)
    return {"soft": 4 * np.mean(sums * kl_divergence(powers / sums[:, None], softmax(z, axis=1)))}


def rkd_by_hand(z, labels, t) -> dict[str, float]:
    def relations(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances = np.array([[np.linalg.norm(a - b) for a in points] for b in points])
        angles = np.zeros((len(points),) * 3)
        for i, j, k in np.ndindex(angles.shape):
            if i not in (j, k):
                a, b = points[j] - points[i], points[k] - points[i]
                angles[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return distances / distances[distances > 0].mean(), angles

    def huber(a: np.ndarray, b: np.ndarray) -> float:
        gap = np.abs(a - b)
        return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()

    (ours, our_angles), (theirs, their_angles) = relations(z), relations(t)
    return {"distance": 25 * huber(ours, theirs), "angle": 50 * huber(our_angles, their_angles)}


@pytest.mark.parametrize(
    ("name", "arguments", "by_hand", "options"),
    [
        ("kd", {"temperature": 5, "alpha": 0.5, "divergence": "forward"}, kd_by_hand, ("forward",)),
        ("kd", {"temperature": 5, "alpha": 0.5, "divergence": "reverse"}, kd_by_hand, ("reverse",)),
        (
            "dkd",
            {"weight": 0.5, "alpha": 1, "beta": 8, "temperature": 4, "warm_up": 0, "logit_standardization": False},
            dkd_by_hand,
            (4,),
        ),
        ("dist", {"weight": 0.5, "beta": 2, "gamma": 3, "temperature": 4}, dist_by_hand, (4,)),
        ("wttm", {"weight": 0.5, "beta": 4, "gamma": 0.2}, wttm_by_hand, (0.2,)),
        ("rkd", {"weight": 0.5, "distance": 25, "angle": 50}, rkd_by_hand, ()),
    ],
)
def test_a_methods_terms_are_those_of_its_papers_equation_and_so_is_their_gradient(batch, name, arguments, by_hand, options):
    logits, labels, teacher = batch
    loss = METHODS[name](hard_labels(), **arguments)
    embeddings = (torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True),)
    own = embeddings if name == "rkd" else ()
    terms = loss(logits, labels, DONE, teacher, *own)
    z = (own[0] if own else logits).detach().numpy()
    expected = by_hand(z, labels.numpy(), teacher.numpy(), *options) | {"hard": 0.5 * F.cross_entropy(logits, labels).item()}
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda *varied: total(loss(varied[0], labels, DONE, teacher, *varied[1:])), (logits, *own))


def test_dkd_whose_terms_are_weighted_by_the_teacher_is_kd(batch):
    logits, labels, teacher = batch
    target, non_target, others = decoupled(logits / 4, teacher / 4, labels)
    torch.testing.assert_close((target + others * non_target).mean(), forward_kl(logits, teacher, 4.0))


def test_dkd_warms_up(batch):
    logits, labels, teacher = batch
    options = {"weight": 1, "alpha": 1, "beta": 8, "temperature": 4, "logit_standardization": False}
    warm, cold = METHODS["dkd"](hard_labels(), warm_up=0.5, **options), METHODS["dkd"](hard_labels(), warm_up=0, **options)
    full = cold(logits, labels, torch.tensor(0.2), teacher)
    for done, share in ((0.1, 0.2), (0.5, 1), (0.9, 1)):
        terms = warm(logits, labels, torch.tensor(done, dtype=torch.float64), teacher)
        torch.testing.assert_close(terms, full | {key: share * full[key] for key in ("target", "non_target")})


def test_of_two_classes_dist_compares_the_images_alone(batch):
    logits, labels, teacher = batch
    loss = METHODS["dist"](hard_labels(), weight=1, beta=2, gamma=2, temperature=4)
    assert list(loss(logits[:, :2], labels % 2, DONE, teacher[:, :2])) == ["hard", "intra"]


def test_standardized_logits_have_neither_offset_nor_scale(batch):
    logits, labels, teacher = batch
    loss = kd(hard_labels(), 2.0, 0.1, "forward", logit_standardization=True)
    z = (teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, keepdim=True)
    soft = 0.9 * 4 * forward_kl((logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True), z, 2.0)
    torch.testing.assert_close(loss(logits, labels, DONE, teacher)["soft"], soft, atol=1e-5, rtol=1e-5)


def test_equal_embeddings_have_no_infinite_gradient():
    points = torch.ones(3, 4, requires_grad=True)
    total(
        METHODS["rkd"](hard_labels(), 1, 25, 50)(torch.zeros(3, 2), torch.zeros(3, dtype=int), DONE, torch.eye(3), points)
    ).backward()
    assert points.grad.isfinite().all()
    assert cosines(points).abs().max() == 0
