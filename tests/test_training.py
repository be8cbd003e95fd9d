import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.networks.checkpoints import new_classifier
from pipeline.data.labels import hide_unknown
from pipeline.data.prepared import Split, TrainingData
from pipeline.training.losses import DistillationLoss
from pipeline.core.errors import UserError
from pipeline.networks.inference import choose_precision, predict
from pipeline.training.loop import _Step, fit

RECIPE = {"epochs": 2, "batch_size": 64, "lr": 0.003}


def student(data: TrainingData, seed: int = 0):
    return new_classifier("compact_cnn", {"width": 8, "hidden": 32}, data.dataset, seed)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_learns(data: TrainingData):
    model = student(data)
    history = fit(model, data.train, data.val, F.cross_entropy, epochs=12, batch_size=32, lr=0.003, seed=0).history
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert history[-1].val_accuracy > 0.7


def test_a_seed_decides_everything(data: TrainingData):
    models = [student(data), student(data), student(data, seed=1)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        fit(model, data.train, data.val, F.cross_entropy, seed=seed, **RECIPE)
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_batches_depend_on_the_seed_and_not_on_the_model(data: TrainingData):
    seen = []

    def spy(logits, labels, numbers):
        seen[-1].append(numbers.tolist())
        return F.cross_entropy(logits, labels)

    for width in (4, 8):
        seen.append([])
        model = new_classifier("compact_cnn", {"width": width, "hidden": 16}, data.dataset, 0)
        fit(model, data.train, data.val, spy, torch.arange(400), seed=7, **RECIPE)
    assert seen[0] == seen[1]
    epochs = [sorted(number for batch in seen[0][start : start + 7] for number in batch) for start in (0, 7)]
    assert epochs == [list(range(400))] * 2, "every image once per epoch"
    assert seen[0][0] != seen[0][7], "in another order each epoch"


def test_alpha_one_gives_the_weights_of_training_alone(data: TrainingData):
    alone, distilled = student(data), student(data)
    teacher_logits = torch.randn(400, 10)
    fit(alone, data.train, data.val, F.cross_entropy, seed=3, **RECIPE)
    fit(distilled, data.train, data.val, DistillationLoss(5.0, 1.0, "forward"), teacher_logits, seed=3, **RECIPE)
    assert equal(alone, distilled)


def test_accuracy_is_that_of_the_images_whose_label_is_known(data: TrainingData):
    train = hide_unknown(data, 0.5, seed=0).train
    loss = DistillationLoss(5.0, 0.7, "forward")
    model = student(data)
    predicted = predict(model, train.images).argmax(1)
    recipe = RECIPE | {"lr": 0.0, "epochs": 1}
    history = fit(model, train, data.val, loss, torch.randn(400, 10), seed=0, **recipe).history
    known = train.labels >= 0
    expected = (predicted[known] == train.labels[known]).float().mean().item()
    assert history[0].train_accuracy == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training_and_says_where(data: TrainingData, wrong: float):
    losses = []

    def breaks(logits, labels):
        losses.append(F.cross_entropy(logits, labels) * (wrong if len(losses) == 9 else 1))
        return losses[-1]

    with pytest.raises(UserError, match=r"from step 3 of epoch 2 on, at a learning rate of 0\.003"):
        fit(student(data), data.train, data.val, breaks, seed=0, **RECIPE)


def test_micro_batches_add_up_to_their_batch(data: TrainingData):
    """400 images in batches of 64 leave a last one of 16; the mean over a batch is no mean of means of unequal parts."""
    whole, parts = (
        fit(student(data), data.train, data.val, F.cross_entropy, seed=0, micro_batches=count, **RECIPE)
        for count in (1, 5)
    )
    for epoch, other in zip(whole.history, parts.history, strict=True):
        assert dict(other) == pytest.approx(dict(epoch), rel=1e-3)


def test_a_batch_smaller_than_its_parts_is_refused(data: TrainingData):
    with pytest.raises(UserError, match="400 images in batches of 64 leave a batch of fewer images than its 17 parts"):
        fit(student(data), data.train, data.val, F.cross_entropy, seed=0, micro_batches=17, **RECIPE)


def test_targets_follow_their_images(data: TrainingData):
    def check(logits, labels, teacher_logits):
        assert torch.equal(teacher_logits.argmax(1), labels)
        return F.cross_entropy(logits, labels)

    fit(student(data), data.train, data.val, check, F.one_hot(data.train.labels, 10).float(), seed=0, **RECIPE)


def test_the_weights_of_the_best_epoch_on_validation_images_are_kept(data: TrainingData):
    model = student(data)
    states = []

    def spoilt_after_two_epochs(logits, labels):
        return F.cross_entropy(logits, labels) * (1 if len(states) < 2 else -1)

    record = fit(
        model,
        data.train,
        data.val,
        spoilt_after_two_epochs,
        epochs=4,
        batch_size=64,
        lr=0.003,
        seed=0,
        on_epoch=lambda _: states.append(copy.deepcopy(model.state_dict())),
    )
    accuracies = [epoch.val_accuracy for epoch in record.history]
    assert accuracies[-1] < max(accuracies), "or the test shows nothing"
    assert accuracies[record.best_epoch - 1] == max(accuracies)
    assert all(torch.equal(states[record.best_epoch - 1][key], tensor) for key, tensor in model.state_dict().items())


def test_recorded_losses_are_those_of_the_model(data: TrainingData):
    model = student(data)
    record = fit(model, data.train, data.val, F.cross_entropy, epochs=1, batch_size=64, lr=0.003, seed=0)
    logits = predict(model, data.val.images)
    assert record.history[0].val_loss == pytest.approx(F.cross_entropy(logits, data.val.labels).item())
    assert record.history[0].val_accuracy == pytest.approx((logits.argmax(1) == data.val.labels).float().mean().item())


def test_a_last_batch_of_one_image_does_not_break_batch_norm(data: TrainingData):
    model = new_classifier("resnet18", {"stem": "imagenet"}, data.dataset, 0)
    train = Split(data.train.images[:33], data.train.labels[:33])
    losses = []

    def spy(logits, labels):
        losses.append((F.cross_entropy(logits, labels), len(labels)))
        return losses[-1][0]

    history = fit(model, train, data.val, spy, epochs=1, batch_size=32, lr=0.001, seed=0).history
    assert [size for _, size in losses] == [32]
    assert history[0].train_loss == pytest.approx(losses[0][0].item())


@pytest.mark.skipif(choose_precision("auto", torch.device("cpu")) != "bf16", reason="this processor has no native bf16")
def test_bf16_learns_as_well_as_fp32(data: TrainingData):
    accuracy = {"fp32": [], "bf16": []}
    for precision, found in accuracy.items():
        for seed in range(4):
            model = student(data, seed)
            fit(
                model,
                data.train,
                data.val,
                F.cross_entropy,
                epochs=8,
                batch_size=32,
                lr=0.003,
                seed=seed,
                precision=precision,
            )
            found.append((predict(model, data.val.images).argmax(1) == data.val.labels).float().mean().item())
    spread = max(max(found) - min(found) for found in accuracy.values())
    assert sum(accuracy["bf16"]) / 4 == pytest.approx(sum(accuracy["fp32"]) / 4, abs=spread + 0.01)


def test_a_step_is_a_function_of_fixed_tensors_and_never_waits_for_the_host(data: TrainingData):
    """What a CUDA graph needs: the same addresses in every step, and no value read back. Shown here on the CPU."""
    step = _Step(student(data), F.cross_entropy, (data.train.images, data.train.labels), 0.003, "fp32")
    batch = torch.arange(64)
    step(batch)
    kept = [*step.model.parameters(), step.loss_sum, step.correct, *step.adam_state().values()]
    addresses = [tensor.data_ptr() for tensor in kept]
    before = step.loss_sum.clone()
    with _NoReading():
        step(batch)
    assert [tensor.data_ptr() for tensor in kept] == addresses
    assert step.loss_sum > before


class _NoReading(TorchDispatchMode):
    """Fails on any operation that brings a value from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value was read back"
        return func(*args, **(kwargs or {}))


def test_a_step_sums_loss_and_hits_over_the_images_of_an_epoch(data: TrainingData):
    model = student(data)
    logits = predict(model, data.train.images)
    step = _Step(model, F.cross_entropy, (data.train.images, data.train.labels), 0.0, "fp32")
    for start in range(0, 400, 100):
        step(torch.arange(start, start + 100))
    assert step.loss_sum.item() / 400 == pytest.approx(F.cross_entropy(logits, data.train.labels).item(), rel=1e-5)
    assert step.correct.item() == (logits.argmax(1) == data.train.labels).sum()
    step.reset()
    assert step.loss_sum.item() == step.correct.item() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_the_weights_of_the_eager_one(data: TrainingData):
    cuda = [Split(*(tensor.cuda() for tensor in split)) for split in (data.train, data.val)]
    weights = []
    for batch_size in (64, 64, 50):
        model = student(data).cuda()
        fit(model, *cuda, F.cross_entropy, epochs=2, batch_size=batch_size, lr=0.003, seed=0)
        weights.append([tensor.cpu() for tensor in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    eager = student(data).cuda()
    step = _Step(eager, F.cross_entropy, tuple(cuda[0]), 0.003, "fp32")
    order = torch.Generator("cuda").manual_seed(0)
    states = []
    for _ in range(2):
        for batch in torch.randperm(400, generator=order, device="cuda").split(50):
            step(batch)
        states.append(copy.deepcopy(eager.state_dict()))
    assert any(
        all(torch.allclose(a, b.cpu(), atol=1e-6) for a, b in zip(weights[2], state.values(), strict=True))
        for state in states
    )
