import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.labels import hide_unknown
from pipeline.data.prepared import Split, TrainingData
from pipeline.networks.checkpoints import new_classifier
from pipeline.networks.inference import choose_precision, predict
from pipeline.training.loop import NotFiniteError, Progress, Settings, fit
from pipeline.training.losses import distillation, hard_labels

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

    def loss(logits, labels, *targets):
        spy(logits, labels, *targets)
        return {"hard": F.cross_entropy(logits, labels)}

    return loss


def test_training_learns(data: TrainingData):
    history = run(student(data), data, hard_labels(), settings=Settings(12, 32, 0.003)).history
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert history[-1].val_accuracy > 0.7


def test_a_seed_decides_everything(data: TrainingData):
    models = [student(data), student(data), student(data, seed=1)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run(model, data, hard_labels(), seed=seed)
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_batches_depend_on_the_seed_and_not_on_the_model(data: TrainingData):
    seen = []
    for width in (4, 8):
        seen.append([])
        model = new_classifier("compact_cnn", {"width": width, "hidden": 16}, data.dataset, 0)
        spy = spying(lambda logits, labels, rows: seen[-1].append(rows.tolist()))
        run(model, data, spy, torch.arange(400), seed=7)
    assert seen[0] == seen[1]
    epochs = [sorted(row for batch in seen[0][start : start + 7] for row in batch) for start in (0, 7)]
    assert epochs == [list(range(400))] * 2, "every image once per epoch"
    assert seen[0][0] != seen[0][7], "in another order each epoch"


def test_alpha_one_gives_the_weights_of_training_alone(data: TrainingData):
    alone, distilled = student(data), student(data)
    run(alone, data, hard_labels(), seed=3)
    run(distilled, data, distillation(5.0, 1.0, "forward"), torch.randn(400, 10), seed=3)
    assert equal(alone, distilled)


def test_accuracy_is_that_of_the_labelled_images(data: TrainingData):
    hidden = hide_unknown(data, 0.5, seed=0)
    model = student(data)
    predicted = predict(model, data.train.images).argmax(1)
    loss = distillation(5.0, 0.7, "forward")
    history = run(model, hidden, loss, torch.randn(400, 10), settings=Settings(1, 64, 0.0)).history
    labelled = hidden.train.labels >= 0
    expected = (predicted[labelled] == hidden.train.labels[labelled]).float().mean().item()
    assert history[0].train_accuracy == pytest.approx(expected)


def test_the_terms_of_the_loss_add_up_to_it(data: TrainingData):
    (epoch, _) = run(student(data), data, distillation(5.0, 0.7, "forward"), torch.randn(400, 10)).history
    assert set(epoch.terms) == {"hard", "soft"}
    assert epoch.train_loss == sum(epoch.terms.values())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_training_and_says_what_to_try(data: TrainingData, wrong: float):
    losses = []

    def breaks(logits, labels):
        losses.append(F.cross_entropy(logits, labels) * (wrong if len(losses) == 9 else 1))
        return {"hard": losses[-1]}

    with pytest.raises(NotFiniteError, match=r"epoch 2 is not finite at a learning rate of 0\.003: try a tenth"):
        run(student(data), data, breaks)


def test_targets_follow_their_images(data: TrainingData):
    def check(logits, labels, teacher_logits):
        assert torch.equal(teacher_logits.argmax(1), labels)

    run(student(data), data, spying(check), F.one_hot(data.train.labels, 10).float())


def test_the_weights_of_the_best_epoch_on_validation_images_are_kept(data: TrainingData):
    model = student(data)
    states = []

    def spoilt_after_two_epochs(logits, labels):
        return {"hard": F.cross_entropy(logits, labels) * (1 if len(states) < 2 else -1)}

    for progress in fit(model, data.train, data.val, spoilt_after_two_epochs, Settings(4, 64, 0.003), 0):  # noqa: B007
        states.append(copy.deepcopy(model.state_dict()))
    accuracies = [epoch.val_accuracy for epoch in progress.history]
    assert accuracies[-1] < max(accuracies), "or the test shows nothing"
    assert accuracies[progress.best_epoch - 1] == max(accuracies)
    assert all(torch.equal(states[progress.best_epoch - 1][key], tensor) for key, tensor in model.state_dict().items())


def test_recorded_losses_are_those_of_the_model(data: TrainingData):
    model = student(data)
    (epoch,) = run(model, data, hard_labels(), settings=Settings(1, 64, 0.003)).history
    logits = predict(model, data.val.images)
    assert epoch.val_loss == pytest.approx(F.cross_entropy(logits, data.val.labels).item())
    assert epoch.val_accuracy == pytest.approx((logits.argmax(1) == data.val.labels).float().mean().item())


def test_the_training_loss_is_the_mean_over_the_images_of_an_epoch(data: TrainingData):
    """400 images in batches of 64 leave a last one of 16: no mean of the batches' means."""
    model = student(data)
    logits = predict(model, data.train.images)
    (epoch,) = run(model, data, hard_labels(), settings=Settings(1, 64, 0.0)).history
    assert epoch.train_loss == pytest.approx(F.cross_entropy(logits, data.train.labels).item(), rel=1e-5)


def test_a_last_batch_of_one_image_does_not_break_batch_norm(data: TrainingData):
    model = new_classifier("resnet18", {"stem": "imagenet"}, data.dataset, 0)
    few = data._replace(train=Split(data.train.images[:33], data.train.labels[:33]))
    sizes = []
    run(model, few, spying(lambda logits, labels: sizes.append(len(labels))), settings=Settings(1, 32, 0.001))
    assert sizes == [32]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["compact_cnn", "resnet18"])
def test_resuming_after_any_epoch_gives_the_same_bits(data: TrainingData, architecture: str, precision: str):
    arguments = STUDENT if architecture == "compact_cnn" else {"stem": "imagenet"}
    settings = Settings(3, 128, 0.003, precision)
    larger = lambda images: images.repeat_interleave(3, 1).repeat_interleave(3, 2)  # noqa: E731
    data = data._replace(  # 24x24: see recipe.train on smaller ones
        dataset=data.dataset.model_copy(update={"image_shape": (24, 24, 1)}),
        train=Split(larger(data.train.images), data.train.labels),
        val=Split(larger(data.val.images), data.val.labels),
    )
    saved = []
    whole = new_classifier(architecture, arguments, data.dataset, 5)
    for progress in fit(whole, data.train, data.val, hard_labels(), settings, 5):
        buffer = io.BytesIO()
        torch.save(progress.state, buffer)
        saved.append((list(progress.history), progress.best_epoch, buffer))
    for history, best_epoch, buffer in saved:
        buffer.seek(0)
        model = new_classifier(architecture, arguments, data.dataset, 5)
        resume = Progress(list(history), best_epoch, torch.load(buffer, weights_only=True))
        epochs = list(fit(model, data.train, data.val, hard_labels(), settings, 5, resume=resume))
        assert len(epochs) == 3 - len(history)
        if epochs:
            assert (epochs[-1].history, epochs[-1].best_epoch) == (progress.history, progress.best_epoch)
        assert equal(model, whole)


@pytest.mark.skipif(choose_precision("auto", torch.device("cpu")) != "bf16", reason="this processor has no native bf16")
def test_bf16_learns_as_well_as_fp32(data: TrainingData):
    accuracy = {
        precision: [
            run(student(data, seed), data, hard_labels(), seed=seed, settings=Settings(8, 32, 0.003, precision))
            .history[-1]
            .val_accuracy
            for seed in range(4)
        ]
        for precision in ("fp32", "bf16")
    }
    spread = max(max(values) - min(values) for values in accuracy.values())
    assert sum(accuracy["bf16"]) / 4 == pytest.approx(sum(accuracy["fp32"]) / 4, abs=spread + 0.01)


class _Readings(TorchDispatchMode):
    """Counts the operations that bring a value from the device to the host, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_as_often_whatever_the_number_of_steps(data: TrainingData):
    """What a CUDA graph needs, shown here on the CPU: a step reads nothing back."""
    counts = []
    for batch_size in (32, 64, 200):
        with _Readings() as readings:
            run(student(data), data, hard_labels(), settings=Settings(1, batch_size, 0.003))
        counts.append(readings.count)
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_step_leaves_weights_and_moments_where_they_are(data: TrainingData):
    """What a CUDA graph needs as well."""
    model, addresses = student(data), []
    for progress in fit(model, data.train, data.val, hard_labels(), Settings(3, 64, 0.003), 0):
        moments = [tensor for state in progress.state["optimizer"]["state"].values() for tensor in state.values()]
        addresses.append([tensor.data_ptr() for tensor in [*model.parameters(), *moments]])
    assert addresses[0] == addresses[1] == addresses[2]


@pytest.fixture
def on_cuda(data: TrainingData) -> Iterator[TrainingData]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return data._replace(**{name: Split(*(t.cuda() for t in getattr(data, name))) for name in ("train", "val")})


def test_a_captured_step_gives_the_weights_of_the_eager_one(on_cuda: TrainingData):
    weights = []
    for batch_size in (64, 64, 50):
        model = student(on_cuda).cuda()
        run(model, on_cuda, hard_labels(), settings=Settings(1, batch_size, 0.003))
        weights.append([tensor.cpu() for tensor in model.state_dict().values()])
    assert all(map(torch.equal, weights[0], weights[1]))
    eager = student(on_cuda).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(eager.parameters(), 0.003, fused=True, capturable=True)
    order = torch.Generator("cuda").manual_seed(0)
    for rows in torch.randperm(400, generator=order, device="cuda").split(50):
        optimizer.zero_grad()
        F.cross_entropy(eager(on_cuda.train.images[rows]), on_cuda.train.labels[rows]).backward()
        optimizer.step()
    assert all(torch.allclose(a, b.cpu(), atol=1e-6) for a, b in zip(weights[2], eager.state_dict().values(), strict=True))
