"""Sets too large for memory: how they are prepared, placed and trained on. Nothing here is large; the limits are lowered."""

import contextlib
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from faults.checkout import Checkout
from pipeline.networks.checkpoints import new_classifier
from pipeline.data import arrays, preparation, prepared, streaming
from pipeline.fetching.preparation import prepare
from pipeline.data.prepared import TrainingData, load_training_data
from pipeline.fetching.sources import read_source
from pipeline.training.loop import fit
from tests.conftest import small_checkout, write_npz

CPU = torch.device("cpu")


def mapped(address: int) -> bool:
    """Whether memory of this process is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[4] != "0"  # the inode
    raise AssertionError(hex(address))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_prepared_images_stay_on_the_disk(own_npz: Path, tmp_path: Path):
    prepare(read_source(str(own_npz)), 0.1, tmp_path / "out")
    data = load_training_data(tmp_path / "out", CPU)
    assert mapped(data.train.images.data_ptr())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_a_large_archive_unpacks_into_a_file_that_nobody_sees(
    own_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    small = read_source(str(own_npz))
    monkeypatch.setattr(arrays, "SMALL", 1000)
    monkeypatch.setattr(arrays, "PLAUSIBLE", 1e9)
    before = set(tmp_path.iterdir())
    large = read_source(str(own_npz))
    assert set(tmp_path.iterdir()) == before
    for split, (images, labels) in small.splits.items():
        np.testing.assert_array_equal(large.splits[split][0], images)
        np.testing.assert_array_equal(large.splits[split][1], labels)
    assert mapped(large.splits["train"][0].ctypes.data)
    assert not mapped(small.splits["train"][0].ctypes.data)


def test_a_full_disk_is_no_damaged_archive(own_npz: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "SMALL", 1000)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        read_source(str(own_npz))


def test_prepared_in_small_steps_a_set_is_the_same(own_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = read_source(str(own_npz))
    del source.splits["val"]
    at_once = prepare(source, 0.1, tmp_path / "at once")
    monkeypatch.setattr(preparation, "CHUNK", 1000)
    in_steps = prepare(source, 0.1, tmp_path / "in steps")
    assert in_steps == at_once
    for path in (tmp_path / "at once").rglob("*.npy"):
        assert path.read_bytes() == (tmp_path / "in steps" / path.relative_to(tmp_path / "at once")).read_bytes()
        assert np.load(path).shape


@pytest.mark.parametrize("rows", [None, torch.arange(200).repeat(2)])
def test_a_streamed_training_is_that_of_images_in_memory(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch, rows: torch.Tensor | None
):
    found = []
    for fits in (True, False):
        monkeypatch.setattr(streaming, "fits", lambda size, device, fits=fits: fits)
        model = new_classifier("compact_cnn", {"width": 4, "hidden": 16}, data.dataset, 0)
        result = fit(model, data.train, data.val, F.cross_entropy, epochs=2, batch_size=64, lr=0.01, seed=0, rows=rows)
        found.append((result, [*model.state_dict().values()]))
    (resident, weights), (streamed, others) = found
    assert streamed == resident
    assert all(map(torch.equal, weights, others))


def test_images_that_do_not_fit_are_given_out_batch_by_batch(data: TrainingData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streaming, "fits", lambda size, device: False)
    asked = []
    monkeypatch.setattr(streaming, "_will_need", lambda images, batch: asked.append(batch.tolist()))
    numbers = torch.randperm(400).split(64)
    for number, (batch, images) in enumerate(streaming.batches(data.train.images, numbers, CPU)):
        assert torch.equal(images, data.train.images[numbers[number]])
        assert torch.equal(batch, numbers[number])
        assert len(asked) == min(number + 1 + streaming.AHEAD, len(numbers)), "asked for ahead"
    assert asked == [batch.tolist() for batch in numbers]


def peak_anonymous(checkout: Checkout, stage: str) -> int:
    """The most memory, in MiB, that a stage has held at a time and that is no file's."""
    process = checkout.start(*checkout.stage(stage))
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(OSError, AttributeError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(re.search(r"RssAnon:\s*(\d+) kB", status).group(1)) // 2**10)
        time.sleep(0.005)
    assert process.returncode == 0, process.communicate()[0]
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_set(tmp_path: Path):
    peaks = []
    counts = (1_000, 24_000)  # of 64x64 pixels in three colours: 12 and 281 MiB of training images
    for count in counts:
        checkout = small_checkout(tmp_path / str(count))
        images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        few, labels = images[:100], np.arange(count) % 2
        kept = {"train_images": images, "train_labels": labels, "val_images": few, "val_labels": labels[:100]}
        write_npz(checkout.folder / "own.npz", **kept, test_images=few, test_labels=labels[:100])
        checkout.set(seeds=[0], precision="fp32", distillation__epochs=1, student={"width": 1, "hidden": 4})
        peaks.append([peak_anonymous(checkout, stage) for stage in ("fetch_data distillation", "train_student_alone")])
    further = (counts[1] - counts[0]) * 64 * 64 * 3 / 2**20
    for small, large in zip(*peaks, strict=True):
        assert large - small < further / 2, peaks  # the same training varies by up to 70 MiB


def test_what_fits_depends_on_what_is_free(monkeypatch: pytest.MonkeyPatch):
    import psutil

    free = psutil.virtual_memory().available
    assert prepared.fits(free // 4, CPU)
    assert not prepared.fits(free, CPU)
