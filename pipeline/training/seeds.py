"""A stage's trainings side by side: each in a process of its own, with exactly the threads that its recipe says.

Results depend neither on the machine's cores nor on its load. The processes come from a fork server that imports PyTorch once.
They only write to the disk and tell their parent, which alone shows progress and talks to MLflow.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.core.errors import UserError, is_disk_full, no_space
from pipeline.core.files import atomic_folder
from pipeline.networks.description import checkpoint_path
from pipeline.training.cache import Record, prune
from pipeline.training.recipe import Recipe, train

# What forked processes find imported. Making an Adam imports the compiler, which takes a second.
PRELOAD = ["pipeline.training.loop", "pipeline.networks.checkpoints", "pipeline.data.prepared", "torch._dynamo"]
# glibc's own settings: reuse the memory of one step in the next instead of returning it to the system and faulting it in again.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


@dataclass
class _Child:
    """A training in its process."""

    recipe: Recipe
    process: Any
    pipe: Connection
    bar: tqdm
    record: Record | None = None
    resumed_at: int | None = None  # epochs that were done when it started
    checkpoint: Path | None = None
    problem: str | None = None


def train_seeds(recipes: Sequence[Recipe], root: Path, jobs: int | str, folder: Path) -> Iterator[Record]:
    """Start trainings, at most `jobs` at a time, and return an iterator of their records: at the start and after each epoch.

    Finished trainings in `root` (cache.trainings_folder) are taken from there, interrupted ones resume. When the iterator
    ends, `folder` holds a checkpoint per seed, `seed<k>.safetensors`, and nothing else. `jobs` "auto" leaves cores to other
    stages of the checkout that are at work.

    Raises UserError, after the others have finished, if some trainings failed; `folder` is then as before.
    """
    os.environ.update({name: value for name, value in MEMORY.items() if name not in os.environ})
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(PRELOAD)
    threads, device = recipes[0].threads, recipes[0].device
    cores = max(1, _cores() // threads)
    gpus = _gpus(device)
    shared = cores if jobs == "auto" and not gpus else None
    limit = min(len(recipes), (gpus or cores) if jobs == "auto" else int(jobs))
    pending = [(recipe, number) for number, recipe in enumerate(recipes)]
    children = [_start(context, root, *pending.pop(0), shared) for _ in range(limit)]
    return _records(context, root, children, pending, shared, folder)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(device: str) -> int:
    """How many NVIDIA GPUs there are to train on."""
    if device not in ("auto", "cuda") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    import torch

    return torch.cuda.device_count()


def _start(context: BaseContext, root: Path, recipe: Recipe, number: int, cores: int | None) -> _Child:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, recipe, root, cores, number), daemon=True)
    process.start()
    theirs.close()
    bar = tqdm(total=recipe.settings["epochs"], desc=recipe.title, unit="epoch", disable=None, leave=False)
    return _Child(recipe, process, ours, bar)


def _work(pipe: Connection, recipe: Recipe, root: Path, cores: int | None, gpu: int) -> None:
    """What a child does: train, and send records, then the path of the checkpoint; or a message of what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(train(recipe, root, pipe.send, lambda: pipe.send(None), cores, gpu))
    except UserError as error:
        pipe.send(str(error))
    except OSError as error:
        if not is_disk_full(error):
            raise
        pipe.send(no_space(error))


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _records(
    context: BaseContext, root: Path, running: list[_Child], pending: list[tuple[Recipe, int]], cores: int | None, folder: Path
) -> Iterator[Record]:
    """Yield what children send; start a pending training for each that ends; put the checkpoints into `folder` at the end."""
    ended: list[_Child] = []
    while running:
        ready = wait([child.pipe for child in running])
        for child in [child for child in running if child.pipe in ready]:
            try:
                message = child.pipe.recv()
            except EOFError:
                child.process.join()
                running.remove(child)
                ended.append(child)
                yield from _end(child)
                if pending:
                    running.append(_start(context, root, *pending.pop(0), cores))
                continue
            match message:
                case None:
                    tqdm.write(f"{child.recipe.title}: another process is at this training: waiting for it")
                case Record():
                    _show(child, message)
                    yield message
                case Path():
                    child.checkpoint = message
                case _:
                    child.problem = message
    titles: dict[str, list[str]] = {}
    for child in (child for child in ended if child.problem):
        titles.setdefault(child.problem, []).append(child.recipe.title)
    if titles:
        raise UserError("; ".join(f"{', '.join(sorted(named))}: {problem}" for problem, named in titles.items()))
    with atomic_folder(folder) as made:
        for child in ended:
            shutil.copyfile(child.checkpoint, checkpoint_path(made, child.recipe.seed))
    prune(root)


def _show(child: _Child, record: Record) -> None:
    """Bring a training's progress line up to date."""
    if child.record is None and record.history and not record.finished:
        tqdm.write(f"{child.recipe.title}: resumes after epoch {len(record.history)} of {record.epochs}")
    child.resumed_at = len(record.history) if child.record is None else child.resumed_at
    child.record = record
    child.bar.update(len(record.history) - child.bar.n)
    if record.history:
        last = record.history[-1]
        child.bar.set_postfix_str(f"loss {last.train_loss:.4f}, validation accuracy {last.val_accuracy:.4f}")


def _end(child: _Child) -> Iterator[Record]:
    """Say how a training ended; its record, once more, if its process ended without a word."""
    child.bar.close()
    record = child.record
    if child.checkpoint:
        best = record.history[record.best_epoch - 1]
        how = f"{record.seconds:.1f} s on {record.device}, {record.parameters['precision']}"
        if child.resumed_at == record.epochs:
            how = "taken from .trainings/"
        print(
            f"{child.recipe.title}: validation accuracy {best.val_accuracy:.4f} after epoch {record.best_epoch}"
            f" of {record.epochs}; {how}",
            flush=True,
        )
    elif not child.problem:
        code = child.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}: the same command resumes it" if code < 0 else "failed, see above"
        child.problem = how
        if record:
            yield record.model_copy(update={"failed": child.problem})
