"""Sets too large for memory: how they are placed and trained on. Nothing here is large; the limits are lowered."""

import contextlib
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.data.prepared import TrainingData, load_training_data
from pipeline.data.streaming import fits, streamed
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.checkpoints import new_classifier
from pipeline.training.loop import Settings, fit
from pipeline.training.losses import hard_labels
from tests.checkout import Checkout
from tests.conftest import is_mapped, small_checkout, write_npz

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")


@linux
def test_prepared_images_stay_on_the_disk(npz: Path, tmp_path: Path):
    prepare(read_source(str(npz)), 0.1, tmp_path / "out")
    assert is_mapped(load_training_data(tmp_path / "out", CPU).train.images.data_ptr())


@pytest.mark.parametrize("rows", [None, torch.arange(200).repeat(2)])
def test_a_streamed_training_is_that_of_images_in_memory(data: TrainingData, rows: torch.Tensor | None):
    results = []
    for options in ({}, {"batches": partial(streamed, device=CPU)}):
        model = new_classifier("compact_cnn", {"width": 4, "hidden": 16}, data.dataset, 0)
        *_, last = fit(model, data.train, data.val, hard_labels(), Settings(2, 64, 0.01), 0, rows=rows, **options)
        results.append((last.history, [*model.state_dict().values()]))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


def peak_anonymous(checkout: Checkout, stage: str) -> int:
    """The most memory, in MiB, that a stage and its children held at a time and that is no file's."""
    process = checkout.start(*checkout.stage(stage))
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, TypeError, psutil.Error):  # it has just ended
            family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
            texts = [Path(f"/proc/{pid}/status").read_text() for pid in family]
            peak = max(peak, *(int(re.search(r"RssAnon:\s*(\d+) kB", text)[1]) // 2**10 for text in texts))
        time.sleep(0.005)
    assert process.returncode == 0, process.communicate()[0]
    return peak


@linux
@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path: Path):
    peaks = []
    counts = (1_000, 24_000)  # of 64x64 pixels in three colours: 12 and 281 MiB of training images
    for count in counts:
        checkout = small_checkout(tmp_path / str(count))
        images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        splits = {"train": count, "val": 100, "test": 100}
        arrays = {f"{split}_images": images[:number] for split, number in splits.items()}
        labels = {f"{split}_labels": np.arange(number) % 2 for split, number in splits.items()}
        write_npz(checkout.folder / "images.npz", **arrays, **labels)
        checkout.set(seeds=[0], precision="fp32", distillation__epochs=1, student__width=1, student__hidden=4)
        peaks.append([peak_anonymous(checkout, stage) for stage in ("fetch_data distillation", "train_student_alone")])
    further = (counts[1] - counts[0]) * 64 * 64 * 3 / 2**20
    for small, large in zip(*peaks, strict=True):
        assert large - small < further / 2, peaks  # the same training varies by up to 70 MiB


def test_what_fits_depends_on_what_is_free():
    free = psutil.virtual_memory().available
    assert fits(free // 4, CPU)
    assert not fits(free, CPU)
