"""A stage's trainings side by side: on CPUs each in a process of its own, with exactly the threads that its recipe says.

Results depend neither on the machine's cores nor on its load. The processes come from a fork server that imports PyTorch once.
They write to the disk and tell their parent, which alone shows progress and talks to MLflow. Small trainings on one GPU share a
process, whose start costs more than they do: each in a thread, with a stream of its own.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.networks.names import WITHOUT_DROPOUT
from pipeline.training.cache import Record, prune
from pipeline.training.recipe import Recipe, train

# What forked processes find imported. Making an Adam imports the compiler, which takes a second.
PRELOAD = ["pipeline.training.loop", "pipeline.networks.checkpoints", "pipeline.data.prepared", "torch._dynamo"]
# glibc's own settings: reuse the memory of one step in the next instead of returning it to the system and faulting it in again.
# Measured for the default student, 25,600 images: 0.5 to 0.6 s of system time with them, 1.3 and 4.1 s without.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Trainings at a time on a GPU, in threads of one process: on images of up to SMALL pixels each way, one leaves most of it idle.
# Measured on an H100, 54,000 images of 28x28, five epochs, with their start: 1.4 s a student with one at a time, 1.0 with two,
# 0.7 with four, 0.6 with eight; with a process each 3.0, 1.9, 1.4 and 1.3.
PER_GPU, SMALL = 8, 64


@dataclass
class _Training:
    """A training, as its parent knows it."""

    recipe: Recipe
    bar: tqdm
    record: Record | None = None  # the last that came
    trains: bool = False  # is not taken from the cache


@dataclass
class _Child:
    """A process, and by seed the trainings in it that are not over."""

    process: BaseProcess
    pipe: Connection
    trainings: dict[int, _Training]


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


def gpu_count(device: str) -> int:
    """How many GPUs trainings on `device`, as in choose_device, may use here; PyTorch is imported only if there may be one."""
    if device not in ("auto", "cuda") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def train_seeds(recipes: Sequence[Recipe], root: Path, jobs: int | str, folder: Path) -> Iterator[Record]:
    """Start trainings, at most `jobs` at a time, and return an iterator of their records: at the start and after each epoch.

    Finished trainings in `root` (cache.trainings_folder) are taken from there, interrupted ones resume. When the iterator
    ends, `folder` holds a checkpoint per seed, `seed<k>.safetensors`, and nothing else. `jobs` "auto": as many as the cores
    allow, but where fewer than twice as many are left, all of these, so that no core is idle while the last one trains: five
    seeds on two cores took 0.88 to 0.93 of the time. All stages of the checkout together have no more at work than that. Or
    PER_GPU per GPU, one where they cannot share it.

    Raises UserError, after the others have finished, if some trainings failed; `folder` is then as before. A process that is
    killed takes all its trainings with it.
    """
    context, first = preload(), recipes[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, gpus, threads = max(1, cores // first.threads), gpu_count(first.device), 1
    processes, groups = (gpus or most) if jobs == "auto" else int(jobs), [[recipe] for recipe in recipes]
    if gpus and first.architecture in WITHOUT_DROPOUT and max(load_dataset(first.data).image_shape[:2]) <= SMALL:
        threads = PER_GPU if jobs == "auto" else max(1, processes // gpus)
        groups = [recipes[number::gpus] for number in range(min(gpus, len(recipes)))]
    shared = 2 * most - 1 if jobs == "auto" and not gpus else 0  # trainings that may share the cores
    running, queue = [], list(enumerate(groups))

    def start_next() -> None:
        left = len(running) + len(queue)
        while queue and len(running) < (left if left <= shared else processes):
            running.append(_start(context, root, shared or None, threads, *queue.pop(0)))

    start_next()
    return _records(running, start_next, root, folder)


def _start(context: BaseContext, root: Path, places: int | None, threads: int, number: int, recipes: Sequence[Recipe]) -> _Child:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, recipes, root, places, threads, number), daemon=True)
    process.start()
    theirs.close()
    options = {"unit": "epoch", "disable": None, "leave": False}
    bars = {recipe.seed: tqdm(total=recipe.settings["epochs"], desc=recipe.title, **options) for recipe in recipes}
    return _Child(process, ours, {recipe.seed: _Training(recipe, bars[recipe.seed]) for recipe in recipes})


def _work(pipe: Connection, recipes: Sequence[Recipe], root: Path, places: int | None, threads: int, gpu: int) -> None:
    """What a child does: train, and send seed and record, then seed and the checkpoint's path or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sending = threading.Lock()

    def send(seed: int, message: Record | Path | str | None) -> None:
        with sending:
            pipe.send((seed, message))

    def work(recipe: Recipe) -> None:
        try:
            result = train(recipe, root, partial(send, recipe.seed), places, gpu)
        except UserError as error:
            result = str(error)
        except Exception as error:
            result = file_problem(error) if isinstance(error, OSError) else None
            if not result:
                result = "failed, see above"
                print(f"{recipe.title}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        send(recipe.seed, result)

    if len(recipes) == 1:  # in this thread: PyTorch's number of threads is meant for it
        work(*recipes)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, recipes))


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _records(running: list[_Child], start_next: Callable[[], None], root: Path, folder: Path) -> Iterator[Record]:
    """Yield what the children in `running` send; start the next when one ends; put the checkpoints into `folder` at the end."""
    checkpoints: dict[int, Path] = {}  # by seed
    failures: dict[str, list[str]] = {}  # titles by what went wrong
    while running:
        for pipe in wait([child.pipe for child in running]):
            child = next(child for child in running if child.pipe is pipe)
            try:
                messages = [pipe.recv()]
            except (EOFError, OSError):  # the second in the middle of a message
                child.process.join()
                running.remove(child)
                start_next()
                code = child.process.exitcode
                killed = f"was killed by {signal.Signals(-code).name}: the same command resumes it" if code < 0 else ""
                messages = [(seed, killed or "failed, see above") for seed in child.trainings]
            for seed, message in messages:
                training = child.trainings[seed]
                if isinstance(message, Path):
                    checkpoints[seed] = message
                elif isinstance(message, str):
                    failures.setdefault(message, []).append(training.recipe.title)
                if isinstance(message, Path | str):
                    del child.trainings[seed]
                _show(training, message)
                record = message
                if isinstance(message, str) and training.record:
                    record = training.record.model_copy(update={"failed": message})
                if isinstance(record, Record):
                    yield record
    if failures:
        raise UserError("; ".join(f"{', '.join(sorted(titles))}: {problem}" for problem, titles in failures.items()))
    with atomic_folder(folder) as made:
        for seed, checkpoint in checkpoints.items():
            shutil.copyfile(checkpoint, checkpoint_path(made, seed))
    prune(root)


def _show(training: _Training, message: Record | Path | str | None) -> None:
    """Keep the record that came and bring the progress line up to date; say that the training waits, resumes or is over."""
    title = training.recipe.title
    if message is None:
        tqdm.write(f"{title}: another process is at this training: waiting for it")
    elif isinstance(message, Record):
        epochs = len(message.history)
        if not training.record and 0 < epochs < message.epochs:
            tqdm.write(f"{title}: resumes after epoch {epochs} of {message.epochs}")
        training.record, training.trains = message, training.trains or not message.finished
        training.bar.update(epochs - training.bar.n)
        if epochs:
            training.bar.set_postfix_str(f"loss {message.history[-1].train_loss:.4f}{_validation(message.history[-1])}")
    else:
        training.bar.close()
        if isinstance(message, Path):
            record = training.record
            best = record.history[record.best_epoch - 1]
            how = f"{record.seconds or 0:.1f} s on {record.device}, {record.parameters.get('precision')}"
            how = how if training.trains else "taken from .trainings/"
            figure = _validation(best).removeprefix(", ") or f"training loss {best.train_loss:.4f}"
            print(f"{title}: {figure} after epoch {record.best_epoch} of {record.epochs}; {how}", flush=True)


def _validation(epoch: Epoch) -> str:
    return "" if epoch.val_accuracy is None else f", validation accuracy {epoch.val_accuracy:.4f}"
