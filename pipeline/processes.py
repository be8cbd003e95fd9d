"""Several processes at one training, each on its part of every batch: with torch.distributed, started as torchrun does.

With one process, all of this does nothing. A stage with several starts copies of itself on this machine; for several machines the
user starts the stage with torchrun on each.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.inference import choose_device, predict

PATIENCE = 5  # seconds in which the starter ends the other processes when one is lost


def join(processes: int, device_name: str) -> torch.device:
    """The device that this process trains on, `device_name` as in choose_device.

    In the process that a user or DVC starts with `processes` > 1, this starts them, waits for their end and does not return.
    Raises UserError if one of them ended badly, saying which and why.
    """
    if dist.is_torchelastic_launched():
        return _join(device_name)
    if processes > 1:
        _start(processes)
        raise SystemExit(0)
    return choose_device(device_name)


def _join(device_name: str) -> torch.device:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the starter, however it ends
    sys.excepthook = _patient(sys.excepthook)
    device = choose_device(device_name)
    if device.type == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise UserError(f"processes: there are {there} GPUs on this machine, one for each process is wanted")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def _patient(hook: Any) -> Any:
    """An exception hook that waits: where another process is lost, this one fails too, and is ended before it complains."""

    def wait_and_say(*error: Any) -> None:
        time.sleep(PATIENCE)
        hook(*error)

    return wait_and_say


def _start(processes: int) -> None:
    """Start this program `processes` times and wait until all have ended."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it ourselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=PATIENCE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:])
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            reason = (
                f"was killed by {signal.Signals(-failure.exitcode).name}: the same command goes on from the last epoch"
            )
        elif failure.exitcode == 1 and failure.error_file_data:
            raise UserError(failure.message) from error  # its own UserError
        else:
            reason = f"ended with status {failure.exitcode}"
        raise UserError(f"process {rank} of the {processes} that train together {reason}") from error


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def part(rows: Tensor) -> Tensor:
    """The part of `rows` that is for this process: each has another, all of about the same size."""
    return rows.tensor_split(count())[rank()] if count() > 1 else rows


def add_up(*tensors: Tensor) -> None:
    """Put the sum over the processes in the place of each tensor."""
    for tensor in tensors:
        if count() > 1:
            dist.all_reduce(tensor)


def least(tensor: Tensor) -> None:
    """Put the smallest over the processes in the place of a tensor."""
    if count() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MIN)


def from_first(value: Any) -> Any:
    """What the first process has as `value`, in all of them."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def predict_together(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """inference.predict, each process on its part of the images; all get all logits."""
    logits = predict(model, part(images), precision)
    if count() == 1:
        return logits
    whole = logits.new_zeros((len(images), logits.shape[1]))
    part(whole).copy_(logits)
    dist.all_reduce(whole)
    return whole


def together(model: nn.Module) -> nn.Module:
    """`model` for a training step: its gradients are the mean over the processes, its batch norms see the whole batch."""
    if count() == 1:
        return model
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm
    return nn.parallel.DistributedDataParallel(model)


def alone(model: nn.Module) -> contextlib.AbstractContextManager:
    """Where the gradients of what `together` returned are summed up in this process, to be shared later."""
    return model.no_sync() if count() > 1 else contextlib.nullcontext()


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes, and of its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device; torch's SyncBatchNorm needs GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.BatchNorm2d."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        own = torch.zeros(count(), 3, x.shape[1], device=x.device)
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        images = torch.full_like(mean, x.numel() / x.shape[1])
        own[rank()] = torch.stack([mean, variance, images])
        means, variances, counts = _Sum.apply(own).unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total  # Chan et al. 1983, equation 2.1, for several parts
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / total
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = (1, -1, 1, 1)
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
