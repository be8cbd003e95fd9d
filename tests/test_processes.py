"""Trainings by two processes against the same by one."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from faults.checkout import Checkout, sound
from faults.kills import epochs_done
from pipeline import processes
from pipeline.checkpoints import Description, load_checkpoint
from pipeline.files import md5
from tests.conftest import small_checkout

EPOCHS = 6


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with its data; 400 digits in batches of 64 leave a last batch of 16."""
    checkout = small_checkout(tmp_path_factory.mktemp("processes") / "checkout")
    checkout.set(seeds=[0], precision="fp32", baselines__epochs=EPOCHS)
    checkout.environment["OMP_NUM_THREADS"] = "1"
    for track in ("baselines", "distillation"):
        checkout.run(*checkout.stage(f"fetch_data {track}"))
    return checkout


def trained(checkout: Checkout, stage: str, path: str) -> tuple[dict[str, torch.Tensor], Description]:
    checkout.run(*checkout.stage(stage))
    classifier, description = load_checkpoint(
        checkout.folder / "models" / path / "seed0.safetensors", torch.device("cpu")
    )
    return classifier.state_dict(), description


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("train_baselines simple_cnn", "baselines/simple_cnn"),
        ("train_teacher", "distillation/teacher"),
        ("distill_student", "distillation/student_distilled"),
    ],
)
def test_two_processes_make_the_weights_that_one_makes_of_the_same_parts(checkout: Checkout, stage: str, path: str):
    found = []
    for count in (1, 2):
        checkout.set(processes=count, micro_batches=2)
        found.append(trained(checkout, stage, path))
    (one, told), (two, told_too) = found
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for epoch, other in zip(told.history, told_too.history, strict=True):
        assert dict(other) == pytest.approx(dict(epoch), rel=1e-6)


def gradients(share: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Gradients and buffers of a small network with batch norm, trained on its share of seven images."""
    torch.manual_seed(0)
    images, wanted = torch.randn(7, 3, 4, 4) * 3 + 5, torch.randn(7, 3, 4, 4)
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1))
    model = processes.together(network)
    loss = ((model(share(images)) - share(wanted)) ** 2).mean()
    (loss * len(share(images)) * processes.count() / 7).backward()
    return [*(parameter.grad for parameter in network.parameters()), *network.buffers()]


def one_of_two(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(processes.part), folder / f"{rank}.pt")


def test_batch_norm_sees_the_whole_batch(tmp_path: Path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    alone = gradients(lambda rows: rows)
    for rank in (0, 1):
        for found, expected in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_killed_process_ends_the_stage_in_one_line_and_the_next_run_resumes(checkout: Checkout):
    checkout.set(processes=2, seeds=[1], baselines__epochs=EPOCHS)
    checkpoint = checkout.folder / "models/baselines/simple_cnn/seed1.safetensors"
    stage = checkout.stage("train_baselines simple_cnn")
    checkout.environment["MLFLOW_TRACKING_URI"] = "sqlite:///calm.db"
    checkout.run(*stage)
    calm = md5(checkpoint)
    checkout.environment["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{checkout.folder}/stormy.db"
    checkpoint.unlink()
    process = checkout.start(*stage)
    while process.poll() is None and not any(epochs_done(checkout.folder).values()):
        time.sleep(0.01)
    ranks = [one for one in psutil.Process(process.pid).children() if "pipeline.train_baselines" in one.cmdline()]
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in output.splitlines() if "warn" not in line.lower()]
    assert line.startswith("error: process ")
    assert "of the 2 that train together was killed by SIGKILL" in line
    assert not any(map(alive, ranks))
    assert not checkpoint.exists()
    (before,) = epochs_done(checkout.folder).values()
    assert before >= 1
    checkout.run(*stage)
    assert md5(checkpoint) == calm
    (run,) = checkout.mlflow_runs(uri)
    assert sound(uri, run, EPOCHS)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_user_can_put_right_is_said_once(checkout: Checkout):
    checkout.set(processes=2, micro_batches=8, seeds=[0], baselines__batch_size=398)
    done = checkout.run(*checkout.stage("train_baselines simple_cnn"), expect=1)
    assert done.stderr.count("error:") == 1
    assert "choose another batch size" in done.stderr


def test_a_stage_under_torchrun_is_one_of_its_processes(checkout: Checkout):
    """As on several machines, where the user starts torchrun on each."""
    checkout.set(processes=1, micro_batches=1, seeds=[2], baselines__epochs=1, baselines__batch_size=64)
    torchrun = ["torchrun", "--nproc-per-node", "2", "-m", "pipeline.train_baselines", "simple_cnn"]
    done = checkout.run(*torchrun)
    assert done.stdout.count("2 processes") == 1


def test_processes_end_with_the_one_that_started_them(checkout: Checkout):
    checkout.set(processes=2, seeds=[3], baselines__epochs=1000)
    process = checkout.start(*checkout.stage("train_baselines simple_cnn"))
    while process.poll() is None and not any(epochs_done(checkout.folder).values()):
        time.sleep(0.01)
    ranks = [one for one in psutil.Process(process.pid).children() if "pipeline.train_baselines" in one.cmdline()]
    process.kill()
    deadline = time.monotonic() + 10
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
