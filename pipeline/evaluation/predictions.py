"""What a track's models answer for its validation and test images. Alone in this package, this runs the networks."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.core.cli import end_with
from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.dataset import Dataset
from pipeline.networks.description import Description, checkpoints_in
from pipeline.networks.outside import is_measured, outside_in, read_outside, read_outside_logits

if TYPE_CHECKING:
    from pipeline.data.prepared import EvaluationData


class Answers(NamedTuple):
    """One model's answers, and what is known of its training."""

    detail: dict[str, Any]  # as in `comparisons.Evaluation`, without what is computed
    trainings: list[Description]  # by seed; of a teacher from outside none
    parameters: int | None  # their number; None where it is not known, as of a teacher that is a file of logits
    # By split, float64 (S, N, K): in the order of the seeds, images and classes. In a cross-validation, NaN for images that a
    # seed does not test. Splits without images, or of which a teacher from outside has no logits, are left out.
    probabilities: dict[str, np.ndarray]


class Predictions(NamedTuple):
    """The answers of a track's models, and what they were asked."""

    dataset: Dataset
    models: dict[str, Answers]
    labels: np.ndarray  # int64 (N,), of the test images
    val_labels: np.ndarray  # int64 (M,); (0,) where there are no validation images
    patients: np.ndarray | None  # whose a test image is, int64 (N,), if that is known


def predict_track(folder: Path, data: "EvaluationData", models: Sequence[str]) -> Predictions:
    """What every checkpoint in `folder`/<model> answers, and teachers from outside: their file's logits.

    A teacher from outside without logits of the test images is left out. Raises UserError if a checkpoint is missing, damaged or
    trained on other data than `data`.
    """
    answers = {model: _answers(folder / model, data) for model in models if is_measured(folder / model)}
    return Predictions(data.dataset, answers, *(split.labels.cpu().numpy() for split in (data.test, data.val)), data.patients)


@contextlib.contextmanager
def predicted_meanwhile(
    folder: Path, data: Path, models: Sequence[str], device: str, threads: int
) -> Iterator[Callable[[], Predictions]]:
    """`predict_track` by a process of its own, while the block goes on: it gets a function that waits for what comes of it.

    `data` is the folder of the prepared set, `device` as in choose_device, `threads` what PyTorch computes with.
    """
    context = multiprocessing.get_context("spawn")  # the other platforms' way: this process may have threads
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, folder, data, models, device, threads), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the child has it: Ctrl-C is its parent's, which ends it
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()

    def wait() -> Predictions:
        try:
            result = ours.recv()
        except (EOFError, OSError):  # the second in the middle of a message
            raise UserError(f"{folder}: the process that predicts was killed or failed, see above") from None
        if isinstance(result, Exception):
            raise result
        return result

    try:
        yield wait
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, folder: Path, data: Path, models: Sequence[str], device: str, threads: int) -> None:
    threading.Thread(target=end_with, args=(multiprocessing.parent_process().pid,), daemon=True).start()
    import torch

    from pipeline.data.prepared import load_evaluation_data
    from pipeline.networks.inference import choose_device

    torch.set_num_threads(threads)
    try:
        result = predict_track(folder, load_evaluation_data(data, choose_device(device)), models)
    except (UserError, OSError) as error:  # which core.cli knows how to tell
        result = error
    with contextlib.suppress(BrokenPipeError):  # nobody is left to tell
        pipe.send(result)


def _answers(folder: Path, data: "EvaluationData") -> Answers:
    outside, splits = outside_in(folder), ["test", *(["val"] if len(data.val.labels) else [])]
    return _of_outside(outside, data.dataset, splits) if outside else _of_checkpoints(folder, data, splits)


def _of_outside(paths: Mapping[int, Path], dataset: Dataset, splits: Sequence[str]) -> Answers:
    """From the files of a teacher from outside by seed."""
    from scipy.special import softmax

    first, checksums = read_outside(next(iter(paths.values()))), [md5(path) for path in paths.values()]
    logits = {
        split: np.stack([read_outside_logits(path, split, dataset) for path in paths.values()])
        for split in splits
        if split in first.splits
    }
    network = {
        "architecture": f"outside: {first.kind}",
        "arguments": {},
        "parameters": first.parameters,
        "setting": first.setting,
    }
    files = {"seeds": list(paths), "digests": checksums, "checkpoints": checksums}
    no_training = {"best_epochs": [], "histories": [[] for _ in paths]}
    probabilities = {split: softmax(of_split.astype(np.float64), axis=2) for split, of_split in logits.items()}
    return Answers(network | files | no_training, [], first.weights, probabilities)


def _of_checkpoints(folder: Path, data: "EvaluationData", splits: Sequence[str]) -> Answers:
    """From the checkpoints in `folder`."""
    from pipeline.data.prepared import take
    from pipeline.networks.checkpoints import load_checkpoint
    from pipeline.networks.inference import predict

    paths, descriptions, probabilities = checkpoints_in(folder), [], {split: [] for split in splits}
    for path in paths:
        classifier, description = load_checkpoint(path, data.test.labels.device)
        if description.dataset != data.dataset:
            raise UserError(f"{path}: trained on other data ({description.dataset.name}) than is in data/: run dvc repro")
        descriptions.append(description)
        for split in splits:
            images, rows = getattr(data, split), data.rows(split, description.seed)
            answers = np.full((len(images.labels), len(data.dataset.classes)), np.nan)
            answers[rows] = predict(classifier, take(images, rows).images).cpu().double().softmax(dim=1).numpy()
            probabilities[split].append(answers)
    first = descriptions[0]
    detail = {
        **{key: getattr(first, key) for key in ("architecture", "arguments", "parameters", "setting")},
        "seeds": [description.seed for description in descriptions],
        "digests": [description.digest for description in descriptions],
        "checkpoints": [md5(path) for path in paths],
        "best_epochs": [description.best_epoch for description in descriptions],
        "histories": [[epoch.model_dump() for epoch in description.history] for description in descriptions],
    }
    weights = sum(weight.numel() for weight in classifier.parameters())
    return Answers(detail, descriptions, weights, {split: np.stack(of_seeds) for split, of_seeds in probabilities.items()})
