import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from scipy.stats import entropy

from pipeline.data.labels import UNKNOWN
from pipeline.training.losses import distillation, forward_kl, hard_labels, reverse_kl


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = 3 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 10, (8,), generator=generator), teacher


def total(terms):
    return sum(terms.values())


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_divergences_are_scipys(batch, temperature: float):
    logits, _, teacher = batch
    p = softmax(teacher.numpy() / temperature, axis=1)
    q = softmax(logits.detach().numpy() / temperature, axis=1)
    assert forward_kl(logits, teacher, temperature).item() == pytest.approx(np.mean(entropy(p, q, axis=1)))
    assert reverse_kl(logits, teacher, temperature).item() == pytest.approx(np.mean(entropy(q, p, axis=1)))


def test_forward_has_the_gradient_of_hintons_soft_target_cross_entropy(batch):
    logits, _, teacher = batch
    soft = F.cross_entropy(logits / 5, F.softmax(teacher / 5, dim=1))
    (expected,) = torch.autograd.grad(soft, logits)
    (gradient,) = torch.autograd.grad(forward_kl(logits, teacher, 5.0), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("divergence", "kl"), [("forward", forward_kl), ("reverse", reverse_kl)])
def test_the_loss_weighs_labels_by_alpha_and_the_teacher_by_the_rest(batch, divergence: str, kl):
    logits, labels, teacher = batch
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 25 * kl(logits, teacher, 5.0)
    torch.testing.assert_close(total(distillation(hard_labels(), 5.0, 0.7, divergence)(logits, labels, teacher)), expected)


def test_an_image_without_a_label_has_the_teachers_term_alone(batch):
    logits, labels, teacher = batch
    hidden = torch.where(torch.arange(8) < 3, labels, UNKNOWN)
    labelled = F.cross_entropy(logits[:3], labels[:3], reduction="sum") / 8
    expected = 0.7 * labelled + 0.3 * 25 * forward_kl(logits, teacher, 5.0)
    torch.testing.assert_close(total(distillation(hard_labels(), 5.0, 0.7, "forward")(logits, hidden, teacher)), expected)
    none = total(distillation(hard_labels(), 5.0, 0.7, "forward")(logits, torch.full_like(labels, UNKNOWN), teacher))
    torch.testing.assert_close(none, 0.3 * 25 * forward_kl(logits, teacher, 5.0))


def test_alpha_one_is_cross_entropy_to_the_bit_whatever_the_teacher_says(batch):
    logits, labels, teacher = batch
    terms = distillation(hard_labels(), 5.0, 1.0, "forward")(logits, labels, teacher * float("inf"))
    assert list(terms) == ["hard"]
    assert terms["hard"].item() == hard_labels()(logits, labels)["hard"].item()
    assert terms["hard"].item() == F.cross_entropy(logits, labels).item()


def test_the_hard_terms_weight_does_not_depend_on_how_many_images_have_a_label(batch):
    logits, labels, _ = batch
    hidden = torch.where(torch.arange(8) < 2, labels, UNKNOWN)
    term = hard_labels(share=0.25)(logits, hidden)["hard"]
    torch.testing.assert_close(term, F.cross_entropy(logits[:2], labels[:2]))


def test_smoothing_and_weights_are_those_of_the_formula(batch):
    logits, labels, _ = batch
    weights = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    log_q = F.log_softmax(logits, dim=1)
    smooth = F.one_hot(labels, 10) * 0.9 + 0.1 / 10
    torch.testing.assert_close(hard_labels(0.1)(logits, labels)["hard"], -(smooth * log_q).sum(1).mean())
    torch.testing.assert_close(
        hard_labels(weights=weights)(logits, labels)["hard"], -(weights * F.one_hot(labels, 10) * log_q).sum(1).mean()
    )
