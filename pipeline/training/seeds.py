"""A stage's trainings side by side: each in a process of its own, with exactly the threads that its recipe says.

Results depend neither on the machine's cores nor on its load. The processes come from a fork server that imports PyTorch once.
They write to the disk and tell their parent, which alone shows progress and talks to MLflow.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from pipeline.core.errors import UserError, file_problem
from pipeline.core.files import atomic_folder
from pipeline.data.dataset import load_dataset
from pipeline.networks.description import Epoch, checkpoint_path
from pipeline.training.cache import Record, prune
from pipeline.training.recipe import Recipe, train

# What forked processes find imported. Making an Adam imports the compiler, which takes a second.
PRELOAD = ["pipeline.training.loop", "pipeline.networks.checkpoints", "pipeline.data.prepared", "torch._dynamo"]
# glibc's own settings: reuse the memory of one step in the next instead of returning it to the system and faulting it in again.
# Measured for the default student, 25,600 images: 0.5 to 0.6 s of system time with them, 1.3 and 4.1 s without.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Trainings at a time on a GPU: on images of up to SMALL pixels each way, one leaves most of it idle, above all while it starts.
# Measured on an H100, 54,000 images of 28x28, five epochs: 2.9 s a student with one at a time, 1.8 with two, 1.4 with four, 1.3
# with eight.
PER_GPU, SMALL = 4, 64


@dataclass
class _Child:
    """A training in its process."""

    recipe: Recipe
    process: BaseProcess
    pipe: Connection
    bar: tqdm
    record: Record | None = None  # the last that came
    trains: bool = False  # is not taken from the cache
    result: Path | str | None = None  # its checkpoint, or why there is none


def preload() -> BaseContext:
    """Start the server that trainings are forked from, if there is none: it imports PyTorch while this process goes on."""
    for name, value in MEMORY.items():
        os.environ.setdefault(name, value)
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    return context


def train_seeds(recipes: Sequence[Recipe], root: Path, jobs: int | str, folder: Path) -> Iterator[Record]:
    """Start trainings, at most `jobs` at a time, and return an iterator of their records: at the start and after each epoch.

    Finished trainings in `root` (cache.trainings_folder) are taken from there, interrupted ones resume. When the iterator
    ends, `folder` holds a checkpoint per seed, `seed<k>.safetensors`, and nothing else. `jobs` "auto": as many as the cores
    allow, and no more at a time in all stages of the checkout; or PER_GPU per GPU, one where images are not SMALL.

    Raises UserError, after the others have finished, if some trainings failed; `folder` is then as before.
    """
    context = preload()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, of_gpus = max(1, cores // recipes[0].threads), 0
    if recipes[0].device in ("auto", "cuda") and any(Path("/dev").glob("nvidia[0-9]*")):  # else known without PyTorch
        import torch

        small = max(load_dataset(recipes[0].data).image_shape[:2]) <= SMALL
        of_gpus = torch.cuda.device_count() * (PER_GPU if small else 1)
    start = partial(_start, context, root, most if jobs == "auto" and not of_gpus else None)
    queue = list(enumerate(recipes))
    running = [start(*queue.pop(0)) for _ in recipes[: (of_gpus or most) if jobs == "auto" else int(jobs)]]
    return _records(running, queue, start, root, folder)


def _start(context: BaseContext, root: Path, places: int | None, number: int, recipe: Recipe) -> _Child:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, recipe, root, places, number), daemon=True)
    process.start()
    theirs.close()
    bar = tqdm(total=recipe.settings["epochs"], desc=recipe.title, unit="epoch", disable=None, leave=False)
    return _Child(recipe, process, ours, bar)


def _work(pipe: Connection, recipe: Recipe, root: Path, places: int | None, gpu: int) -> None:
    """What a child does: train, and send records, then the path of the checkpoint or a message of what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(train(recipe, root, pipe.send, places, gpu))
    except UserError as error:
        pipe.send(str(error))
    except OSError as error:
        if not (message := file_problem(error)):
            raise
        pipe.send(message)


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _records(
    running: list[_Child], queue: list[tuple[int, Recipe]], start: Callable[[int, Recipe], _Child], root: Path, folder: Path
) -> Iterator[Record]:
    """Yield what children send; start one from the queue for each that ends; put the checkpoints into `folder` at the end."""
    checkpoints: dict[int, Path] = {}  # by seed
    failures: dict[str, list[str]] = {}  # titles by what went wrong
    while running:
        for pipe in wait([child.pipe for child in running]):
            child = next(child for child in running if child.pipe is pipe)
            try:
                message = pipe.recv()
            except (EOFError, OSError):  # the second in the middle of a message
                running.remove(child)
                running += [start(*queue.pop(0))] if queue else []
                _end(child)
                if isinstance(child.result, Path):
                    checkpoints[child.recipe.seed] = child.result
                    continue
                failures.setdefault(child.result, []).append(child.recipe.title)
                message = child.record and child.record.model_copy(update={"failed": child.result})
            else:
                _show(child, message)
            if isinstance(message, Record):
                yield message
    if failures:
        raise UserError("; ".join(f"{', '.join(sorted(titles))}: {problem}" for problem, titles in failures.items()))
    with atomic_folder(folder) as made:
        for seed, checkpoint in checkpoints.items():
            shutil.copyfile(checkpoint, checkpoint_path(made, seed))
    prune(root)


def _show(child: _Child, message: Record | Path | str | None) -> None:
    """Keep what a child sent, and bring its progress line up to date."""
    if message is None:
        tqdm.write(f"{child.recipe.title}: another process is at this training: waiting for it")
    elif not isinstance(message, Record):
        child.result = message
    else:
        epochs = len(message.history)
        if not child.record and 0 < epochs < message.epochs:
            tqdm.write(f"{child.recipe.title}: resumes after epoch {epochs} of {message.epochs}")
        child.record, child.trains = message, child.trains or not message.finished
        child.bar.update(epochs - child.bar.n)
        if epochs:
            child.bar.set_postfix_str(f"loss {message.history[-1].train_loss:.4f}{_validation(message.history[-1])}")


def _end(child: _Child) -> None:
    """Say how a training ended; if its process ended without a word, that is the result."""
    child.process.join()
    child.bar.close()
    record, code = child.record, child.process.exitcode
    if child.result is None:
        killed = f"was killed by {signal.Signals(-code).name}: the same command resumes it" if code < 0 else ""
        child.result = killed or "failed, see above"
    elif isinstance(child.result, Path):
        best = record.history[record.best_epoch - 1]
        how = f"{record.seconds or 0:.1f} s on {record.device}, {record.parameters.get('precision')}"
        how = how if child.trains else "taken from .trainings/"
        figure = _validation(best).removeprefix(", ") or f"training loss {best.train_loss:.4f}"
        print(f"{child.recipe.title}: {figure} after epoch {record.best_epoch} of {record.epochs}; {how}", flush=True)


def _validation(epoch: Epoch) -> str:
    return "" if epoch.val_accuracy is None else f", validation accuracy {epoch.val_accuracy:.4f}"
