import copy
import functools
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.augmentation import view, view_indices
from pipeline.data.labels import hide_unknown
from pipeline.data.prepared import Split, TrainingData
from pipeline.networks.checkpoints import new_classifier
from pipeline.networks.inference import choose_precision, predict
from pipeline.training import loop
from pipeline.training.loop import NotFiniteError, Progress, Settings, auc, fit
from pipeline.training.losses import hard_labels, kd

SETTINGS = Settings(epochs=2, batch_size=64, lr=0.003)
STUDENT = {"width": 8, "hidden": 32}


def student(data: TrainingData, seed: int = 0):
    return new_classifier("compact_cnn", STUDENT, data.dataset, seed)


def run(model, data: TrainingData, loss, *targets, seed: int = 0, settings: Settings = SETTINGS, **options) -> Progress:
    """Train to the end; the last progress."""
    *_, last = fit(model, data.train, data.val, loss, settings, seed, *targets, **options)
    return last


def equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def spying(spy: Callable) -> Callable:
    """Cross-entropy that calls `spy` with its arguments."""

    def loss(logits, labels, done, *targets):
        spy(logits, labels, *targets)
        return {"hard": F.cross_entropy(logits, labels)}

    return loss


def test_training_learns(data: TrainingData):
    history = run(student(data), data, hard_labels(), settings=Settings(12, 32, 0.003)).history
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert history[-1].val_accuracy > 0.7


def test_a_loss_is_told_the_share_of_the_epochs_that_have_begun(data: TrainingData):
    shares = []

    def loss(logits, labels, done):
        shares.append(done.item())
        return {"hard": F.cross_entropy(logits, labels)}

    run(student(data), data, loss, settings=Settings(4, 200, 0.003))
    assert shares == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]


def test_a_seed_decides_everything(data: TrainingData):
    models = [student(data), student(data), student(data, seed=1)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, data, hard_labels(), seed=seed)
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_batches_depend_on_the_seed_and_not_on_the_model(data: TrainingData):
    seen = []

    def spy(logits, labels, rows):
        assert torch.equal(labels, data.train.labels[rows]), "targets follow their images"
        seen[-1].append(rows.tolist())

    for width in (4, 8):
        seen.append([])
        model = new_classifier("compact_cnn", {"width": width, "hidden": 16}, data.dataset, 0)
        run(model, data, spying(spy), torch.arange(400), seed=7)
    assert seen[0] == seen[1]
    epochs = [sorted(row for batch in seen[0][start : start + 7] for row in batch) for start in (0, 7)]
    assert epochs == [list(range(400))] * 2, "every image once per epoch"
    assert seen[0][0] != seen[0][7], "in another order each epoch"


def test_accuracy_is_that_of_the_labelled_images(data: TrainingData):
    hidden = data._replace(train=hide_unknown(data.train, 0.5, seed=0))
    model = student(data)
    predicted = predict(model, data.train.images).argmax(1)
    loss = kd(hard_labels(), 5.0, 0.7, "forward")
    history = run(model, hidden, loss, torch.randn(400, 10), settings=Settings(1, 64, 0.0)).history
    labelled = hidden.train.labels >= 0
    expected = (predicted[labelled] == hidden.train.labels[labelled]).float().mean().item()
    assert history[0].train_accuracy == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_try(data: TrainingData, wrong: float):
    losses = []

    def breaks(logits, labels, done):
        losses.append(F.cross_entropy(logits, labels) * (wrong if len(losses) == 9 else 1))
        return {"hard": losses[-1]}

    with pytest.raises(NotFiniteError, match=r"epoch 2 is not finite at a learning rate of 0\.003: try a tenth"):
        run(student(data), data, breaks)


def test_the_weights_of_the_best_epoch_on_validation_images_are_kept(data: TrainingData):
    model = student(data)
    states = []

    def spoilt_after_two_epochs(logits, labels, done):
        return {"hard": F.cross_entropy(logits, labels) * (1 if len(states) < 2 else -1)}

    for progress in fit(model, data.train, data.val, spoilt_after_two_epochs, Settings(4, 64, 0.003), 0):  # noqa: B007
        states.append(copy.deepcopy(model.state_dict()))
    accuracies = [epoch.val_accuracy for epoch in progress.history]
    assert accuracies[-1] < max(accuracies), "or the test shows nothing"
    assert accuracies[progress.best_epoch - 1] == max(accuracies)
    assert all(torch.equal(states[progress.best_epoch - 1][key], tensor) for key, tensor in model.state_dict().items())


def test_recorded_figures_are_those_of_the_model(data: TrainingData):
    """400 images in batches of 64 leave a last one of 16: the training loss is no mean of the batches' means."""
    model = student(data)
    (epoch,) = run(model, data, hard_labels(), settings=Settings(1, 64, 0.0)).history
    for split, loss in ((data.train, epoch.train_loss), (data.val, epoch.val_loss)):
        assert loss == pytest.approx(F.cross_entropy(predict(model, split.images), split.labels).item(), rel=1e-5)
    (epoch,) = run(model, data, hard_labels(), settings=Settings(1, 64, 0.003)).history
    logits = predict(model, data.val.images)
    assert epoch.val_loss == pytest.approx(F.cross_entropy(logits, data.val.labels).item())
    assert epoch.val_accuracy == pytest.approx((logits.argmax(1) == data.val.labels).float().mean().item())


def test_a_last_batch_of_one_image_does_not_break_batch_norm(data: TrainingData):
    model = new_classifier("resnet18", {"stem": "imagenet"}, data.dataset, 0)
    few = data._replace(train=Split(data.train.images[:33], data.train.labels[:33]))
    sizes = []
    run(model, few, spying(lambda logits, labels: sizes.append(len(labels))), settings=Settings(1, 32, 0.001))
    assert sizes == [32]


@pytest.mark.parametrize(
    ("architecture", "precision", "options"),
    [
        ("compact_cnn", "fp32", {}),
        ("compact_cnn", "bf16", {}),
        ("compact_cnn", "fp32", {"schedule": "cosine", "weight_decay": 0.1, "selection": "auc"}),
        ("compact_cnn", "fp32", {"schedule": "one_cycle", "selection": "loss"}),
        ("compact_cnn", "fp32", {"schedule": "steps", "selection": "last"}),
        ("resnet18", "fp32", {}),
        ("mobilenet_v3_small", "fp32", {}),  # with dropout
        pytest.param("resnet18", "bf16", {}, marks=pytest.mark.slow),  # a minute without native bf16
    ],
)
def test_resuming_after_any_epoch_gives_the_same_bits(data: TrainingData, architecture: str, precision: str, options: dict):
    arguments = {"compact_cnn": STUDENT, "resnet18": {"stem": "imagenet"}}.get(architecture, {})
    settings = Settings(3, 32, 0.003, precision, **options)
    indices = view_indices("shifts", 24, 24)
    augmented = {"view": functools.partial(view, indices=indices), "views": len(indices)} if options else {}

    def few_and_larger(split: Split) -> Split:
        """64 images of 24x24 pixels: see recipe.train on smaller ones."""
        return Split(split.images[:64].repeat_interleave(3, 1).repeat_interleave(3, 2), split.labels[:64])

    dataset = data.dataset.model_copy(update={"image_shape": (24, 24, 1)})
    data = data._replace(dataset=dataset, train=few_and_larger(data.train), val=few_and_larger(data.val))
    saved = []
    uninterrupted = new_classifier(architecture, arguments, data.dataset, 5)
    for progress in fit(uninterrupted, data.train, data.val, hard_labels(), settings, 5, **augmented):
        buffer = io.BytesIO()
        torch.save(progress.state, buffer)
        saved.append((list(progress.history), progress.best_epoch, buffer))
    for history, best_epoch, buffer in saved:
        buffer.seek(0)
        model = new_classifier(architecture, arguments, data.dataset, 5)
        resume = Progress(list(history), best_epoch, torch.load(buffer, weights_only=True))
        epochs = list(fit(model, data.train, data.val, hard_labels(), settings, 5, resume=resume, **augmented))
        assert len(epochs) == 3 - len(history)
        if epochs:
            assert (epochs[-1].history, epochs[-1].best_epoch) == (progress.history, progress.best_epoch)
        assert equal(model, uninterrupted)


@pytest.mark.skipif(choose_precision("auto", torch.device("cpu")) != "bf16", reason="this processor has no native bf16")
def test_bf16_learns_as_well_as_fp32(data: TrainingData):
    accuracy = {}
    for precision in ("fp32", "bf16"):
        settings = Settings(8, 32, 0.003, precision)
        runs = [run(student(data, seed), data, hard_labels(), seed=seed, settings=settings) for seed in range(4)]
        accuracy[precision] = [progress.history[-1].val_accuracy for progress in runs]
    spread = np.ptp([*accuracy.values()], axis=1).max()
    assert np.mean(accuracy["bf16"]) == pytest.approx(np.mean(accuracy["fp32"]), abs=spread + 0.01)


@pytest.mark.parametrize(
    ("schedule", "rates"),  # after each of 8 steps of 2 epochs
    [
        ("constant", [0.01] * 8),
        ("cosine", [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 9)]),
        ("steps", [0.01] * 3 + [0.001] * 2 + [0.0001] * 3),
    ],
)
def test_a_schedule_changes_the_learning_rate_step_by_step(data: TrainingData, monkeypatch, schedule: str, rates: list[float]):
    settings, optimizers = Settings(2, 100, 0.01, schedule=schedule), []
    adam, seen = torch.optim.Adam, []
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **o: optimizers.append(adam(*a, **o)) or optimizers[0])
    run(student(data), data, spying(lambda *_: seen.append(optimizers[0].param_groups[0]["lr"])), settings=settings)
    assert [*seen[1:], optimizers[0].param_groups[0]["lr"]] == pytest.approx(rates)


def test_one_cycle_rises_to_the_learning_rate_and_falls_again(data: TrainingData):
    model, seen = student(data), []
    for progress in fit(model, data.train, data.val, hard_labels(), Settings(10, 100, 0.01, schedule="one_cycle"), 0):
        seen.append(progress.state["optimizer"]["param_groups"][0]["lr"])
    assert max(seen) == pytest.approx(0.01, rel=0.05)
    assert seen[0] < max(seen) > 100 * seen[-1]


def test_every_step_takes_its_share_of_the_weights_whatever_the_gradient_is(data: TrainingData):
    model = student(data)
    before = copy.deepcopy([*model.parameters()])
    settings = Settings(2, 100, 0.01, weight_decay=0.5, selection="last")
    run(model, data, lambda logits, *_: {"none": 0 * logits.sum()}, settings=settings)
    for ours, first in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(ours, first * (1 - 0.01 * 0.5) ** 8)


@pytest.mark.parametrize(("selection", "best"), [("accuracy", 2), ("auc", 3), ("loss", 1), ("last", 4)])
def test_the_epoch_is_selected_by(data: TrainingData, monkeypatch, selection: str, best: int):
    figures = iter([(0.1, 0.6, 0.7), (0.4, 0.8, 0.8), (0.5, 0.8, 0.9), (0.6, 0.7, 0.9)])  # loss, accuracy, AUC
    monkeypatch.setattr(loop, "validate", lambda *_: next(figures))
    assert run(student(data), data, hard_labels(), settings=Settings(4, 64, 0.003, selection=selection)).best_epoch == best


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_is_scikit_learns_with_ties_too(classes: int):
    random = np.random.default_rng(0)
    logits, labels = torch.from_numpy(random.integers(-2, 3, (200, classes)).astype(np.float32)), random.integers(0, classes, 200)
    probabilities = logits.double().softmax(1).numpy()
    each = [roc_auc_score(labels == label, probabilities[:, label]) for label in ([1] if classes == 2 else range(classes))]
    assert auc(logits, torch.from_numpy(labels)) == pytest.approx(np.mean(each), abs=1e-12)
    assert auc(logits, torch.zeros(200, dtype=torch.int64)) == 0.5


def test_views_are_drawn_anew_and_targets_follow_them(data: TrainingData):
    indices, seen = view_indices("flips_and_shifts", 8, 8), []
    rows_and_views = torch.arange(400 * 18)

    def looks(images, numbers):
        seen.append([numbers])
        return view(images, numbers, indices)

    def spy(logits, labels, targets):
        assert torch.equal(targets % 18, seen[-1][0]), "the target of the view"
        assert torch.equal(labels, data.train.labels[targets // 18]), "and of the image"

    run(student(data), data, spying(spy), rows_and_views, view=looks, views=18)
    drawn = torch.cat([numbers for (numbers,) in seen])
    assert set(drawn.tolist()) == set(range(18))
    assert not torch.equal(drawn[:400], drawn[400:])


class Readings(TorchDispatchMode):
    """Counts the operations that bring a value from the device to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_host(data: TrainingData):
    """What a CUDA graph needs, shown on the CPU: an epoch of many steps reads as many values back as one of few."""
    counts = []
    for batch_size in (200, 20):
        with Readings() as readings:
            run(student(data), data, hard_labels(), settings=Settings(1, batch_size, 0.003))
        counts.append(readings.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_on_cuda_is_the_same_again_and_as_good_as_on_the_cpu(data: TrainingData):
    """Whose steps are captured as a graph, the last and smaller one of an epoch left out."""
    cuda = data._replace(**{name: Split(*(tensor.cuda() for tensor in getattr(data, name))) for name in ("train", "val")})
    models = [student(data).cuda(), student(data).cuda(), student(data)]
    histories = [run(model, data if model is models[2] else cuda, hard_labels()).history for model in models]
    assert equal(models[0], models[1])
    for on_cuda, on_cpu in zip(histories[0], histories[2], strict=True):
        assert on_cuda.train_loss == pytest.approx(on_cpu.train_loss, rel=0.02)
