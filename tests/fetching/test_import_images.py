"""Every format, layout and refusal, with files that the tests write."""

import io
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit

from pipeline.core.errors import UserError
from pipeline.core.images import fit_image
from pipeline.data.dataset import SPLITS
from pipeline.fetching.import_images import main
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.serving.predict import images_in, read_image
from tests.checkout import Checkout
from tests.conftest import ROOT
from tests.hostile import IEND, png

RANDOM = np.random.default_rng(0)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def scaled(values: np.ndarray) -> np.ndarray:
    """0 to 1 as 0 to 255."""
    return np.rint(np.clip(values, 0, 1) * 255)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape or (16, 12), np.uint8)


def write_image(path: Path, pixels: np.ndarray | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if pixels is None else pixels).save(path, **options)


def write_classes(folder: Path, count: int = 10, classes: str = "ab", suffix: str = ".png") -> Path:
    """`count` grey images of each class, in a folder of its name."""
    for label in classes:
        for number in range(count):
            write_image(folder / label / f"{label}{number:02}{suffix}")
    return folder


def write_splits(folder: Path, splits: tuple[str, ...] = SPLITS, count: int = 20) -> Path:
    for split in splits:
        write_classes(folder / split, count)
    return folder


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def make(source: Path, **options: object) -> dict[str, np.ndarray]:
    """Import `source`; the arrays of the file."""
    out = source.parent / "out.npz"
    main(source, out, **({"force": True, "size": 16} | options))
    return dict(np.load(out))


def refuses(message: str, source: Path, **options: object) -> None:
    """Importing `source` must end with this message and leave nothing."""
    with pytest.raises(UserError, match=message):
        make(source, **options)
    assert not {"out.npz", "out.md"} & {path.name for path in source.parent.iterdir()}


def groups(arrays: dict[str, np.ndarray]) -> list[set[str]]:
    """The patients of the three splits."""
    return [set(arrays[f"{split}_groups"].tolist()) for split in SPLITS]


def test_300_pngs_and_a_table_of_patients_become_a_prepared_set_in_which_no_patient_is_on_two_sides(tmp_path: Path):
    rows = []
    for number in range(300):
        rows.append({"path": f"{number:03}.png", "label": f"{'xyz'[number % 3]}", "patient": f"p{number // 3 % 40}"})
        write_image(tmp_path / "images" / rows[-1]["path"])
    table = write_table(tmp_path / "labels.csv", rows)
    command = [sys.executable, "-m", *f"pipeline.fetching.import_images images out.npz --table {table} --size 28".split()]
    checkout = Checkout(tmp_path)
    checkout.environment["PYTHONPATH"] = str(ROOT)
    printed = checkout.run(*command).stdout
    assert printed.startswith(summary := (tmp_path / "out.md").read_text())
    arrays = np.load(tmp_path / "out.npz")
    patients = groups(arrays)
    assert sum(map(len, patients)) == len(set.union(*patients)) == 40, "no patient is on two sides"
    source = read_source(str(tmp_path / "out.npz"))
    dataset = prepare(source, 0.1, tmp_path / "prepared")
    assert (dataset.classes, dataset.image_shape, dataset.resize) == (["x", "y", "z"], (28, 28, 1), "pad")
    assert sum(dataset.images.values()) == 300
    assert dataset.images == pytest.approx({"train": 210, "val": 30, "test": 60}, abs=12)
    for split, (_, labels) in source.splits.items():
        assert np.bincount(labels) / len(labels) == pytest.approx([1 / 3] * 3, abs=0.05), split
    assert f"{len(patients[2])} in test" in summary
    assert "| all     |     " in summary
    assert checkout.run(*command, expect=1).stderr == "error: out.npz is there already: --force replaces it\n"


@pytest.fixture
def third(tmp_path: Path) -> Path:
    """The folder of a third class of training images, beside two classes of noise in each split."""
    return write_splits(tmp_path / "images", count=2) / "train" / "c"


def imported(third: Path, **options: object) -> np.ndarray:
    """What becomes of the image in the third class."""
    return make(third.parents[1], **options)["train_images"][4]


COLOUR = np.dstack([RAMP, RAMP.T, RAMP[::-1]])


@pytest.mark.parametrize(
    ("name", "options", "image"),
    [
        ("x.png", {}, RAMP),
        ("x.PNG", {}, COLOUR),
        ("x.tif", {}, RAMP),
        ("x.tiff", {"compression": "tiff_deflate"}, COLOUR),
        ("x.jpg", {"quality": 100}, RAMP),
        ("x.jpeg", {"quality": 100}, np.dstack([RAMP] * 3)),
        ("x", {"format": "PNG"}, RAMP),
    ],
)
def test_every_format_gives_its_pixels(third: Path, name: str, options: dict, image: np.ndarray):
    write_image(third / name, image, **options)
    arrays = make(third.parents[1])
    assert arrays["train_images"].shape == (5, 16, 16, image[0, 0].size)
    differences = arrays["train_images"][4].astype(int) - image.reshape(16, 16, -1)
    assert np.abs(differences).max() <= (2 if "j" in name else 0), "of JPEG, rounding"
    assert arrays["train_labels"].tolist() == [0, 0, 1, 1, 2]
    assert arrays["class_names"].tolist() == ["a", "b", "c"]
    assert not {key for key in arrays if key.endswith("groups")}


def test_a_palette_is_colour_unless_grey_is_wanted(third: Path):
    write_image(third / "x.png", noise())
    Image.fromarray(RAMP).convert("P").save(third / "x.png")
    assert np.array_equal(imported(third), np.dstack([RAMP] * 3))
    assert np.array_equal(imported(third, channels=1), RAMP[..., None])


@pytest.mark.parametrize(
    ("name", "pixels"), [("x.png", np.uint16(16)), ("x.tif", np.uint16(16)), ("x.tif", np.float32(16.5)), ("x.tif", np.int32(16))]
)
def test_more_than_8_bits_want_a_window(third: Path, name: str, pixels: np.generic):
    deep = RAMP.astype(pixels.dtype) * pixels
    write_image(third / name, deep)
    refuses(rf"1 files \(.*{name}.*--window LOW HIGH", third.parents[1])
    image = imported(third, window=(1000, 2000))
    assert np.array_equal(image[..., 0], scaled((deep - 1000.0) / 1000))
    assert np.array_equal(read_image(third / name, (16, 16, 1), window=(1000, 2000)), image)
    assert "window 1000 to 2000" in (third.parents[2] / "out.md").read_text()


def test_a_window_that_leaves_few_grey_levels_is_doubted(third: Path, capsys):
    write_image(third / "x.png", RAMP.astype(np.uint16))
    refuses(rf"values 0 to {RAMP.max()}: --window", third.parents[1])
    for path in third.parents[1].rglob("*.png"):
        write_image(path, 10 * RAMP.astype(np.uint16))
    make(third.parents[1], window=(0, 65535), allow_duplicates=True)
    assert "--window 0 65535 makes 11 of 256 grey levels" in capsys.readouterr().err


def test_a_16_bit_tiff_in_which_white_is_zero_is_inverted(third: Path):
    write_image(third / "x.tif", RAMP.astype(np.uint16), tiffinfo={262: 0})
    with Image.open(third / "x.tif") as image:
        assert (image.mode, image.tag_v2[262], np.asarray(image).tolist()) == ("I;16", 0, RAMP.tolist()), "not inverted by Pillow"
    assert np.array_equal(imported(third, window=(0, 255))[..., 0], 255 - RAMP)


@pytest.fixture
def dicom():
    """Writes a DICOM file of one image."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (requirements-dicom.txt)")
    from pydicom.uid import SecondaryCaptureImageStorage

    def write(path: Path, pixels: np.ndarray, kind: str = "MONOCHROME2", bits: int | None = None, **tags: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = pydicom.Dataset()
        dataset.file_meta, dataset.SOPClassUID = pydicom.dataset.FileMetaDataset(), SecondaryCaptureImageStorage
        dataset.set_pixel_data(pixels, kind, bits or 8 * pixels.itemsize)
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        dataset.save_as(path, enforce_file_format=True)

    return write


CT = (np.arange(256).reshape(16, 16) * 16 - 1000).astype(np.int16)
RESCALE, CENTRE = {"RescaleSlope": 2, "RescaleIntercept": 24}, {"WindowCenter": 40, "WindowWidth": 400}
TWO_WINDOWS = {"WindowCenter": [40, 5], "WindowWidth": [400, 9]}  # the first counts


@pytest.mark.parametrize(
    ("pixels", "kind", "options", "window", "expected"),
    [
        (RAMP, "MONOCHROME2", {}, None, RAMP),
        (RAMP, "MONOCHROME1", {}, None, 255 - RAMP),
        (COLOUR, "RGB", {}, None, COLOUR),
        (RAMP.astype(np.uint16) * 16, "MONOCHROME2", {"bits": 12}, None, scaled(RAMP * 16.0 / 4095)),
        # DICOM PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) of the range, x after the rescale
        (CT, "MONOCHROME2", RESCALE | TWO_WINDOWS, None, scaled((CT * 2.0 + 24 - 39.5) / 399 + 0.5)),
        (CT, "MONOCHROME1", {"VOILUTFunction": "SIGMOID"} | CENTRE, None, 255 - scaled(expit(4 * (CT - 40.0) / 400))),
        (CT, "MONOCHROME2", {"RescaleSlope": 1, "RescaleIntercept": -24} | CENTRE, (-100, 300), scaled((CT - 24.0 + 100) / 400)),
    ],
)
def test_dicom_is_windowed(third: Path, dicom, pixels, kind, options, window, expected):
    dicom(third / "IM0001", pixels, kind, **options)
    image = imported(third, window=window)
    assert np.abs(image.astype(int) - expected.reshape(16, 16, -1)).max() <= 1
    assert np.array_equal(read_image(*images_in(third), image.shape, window=window), image), "to predict, too"


def test_dicoms_patients_are_in_one_split_alone(tmp_path: Path, dicom):
    for label in "ab":
        for number in range(40):
            dicom(tmp_path / "images" / label / f"{number}.dcm", noise(), PatientID=f"{label}{number // 2}")
    arrays = make(tmp_path / "images")
    patients = groups(arrays)
    assert sum(map(len, patients)) == len(set.union(*patients)) == 40
    dicom(tmp_path / "images" / "a" / "x.dcm", noise())
    with pytest.raises(UserError, match=r"a/x\.dcm names no patient, though other files do"):
        make(tmp_path / "images")


def test_dicom_that_is_no_single_picture_is_refused(tmp_path: Path, dicom):
    source = write_classes(tmp_path / "images")
    path = source / "a" / "x.dcm"
    for kind, pixels, message in (("MONOCHROME2", np.stack([RAMP, RAMP]), "2 frames"), ("PALETTE COLOR", RAMP, "PALETTE COLOR")):
        dicom(path, pixels, kind)
        refuses(rf"x\.dcm: cannot be read as DICOM: .*{message}", source)
    dicom(path, RAMP)
    whole = path.read_bytes()
    explicit, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"  # the latter may unpack to any size
    length = len(explicit).to_bytes(2, "little"), len(deflated).to_bytes(2, "little")
    bomb = whole.replace(length[0] + explicit, length[1] + deflated)
    two_frames = whole.replace((256).to_bytes(4, "little") + RAMP.tobytes(), (512).to_bytes(4, "little") + 2 * RAMP.tobytes())
    assert len(whole) < len(bomb) < len(two_frames)
    for content in (b"no DICOM", whole[:-20], bomb, two_frames):
        path.write_bytes(content)
        refuses(r"x\.dcm: cannot be read as DICOM", source)


def test_dicom_without_pydicom_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_classes(tmp_path / "images")
    (source / "a" / "x").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refuses(r"DICOM files need pydicom.*pip install -r requirements-dicom\.lock", source)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


SEVERAL = {"save_all": True, "append_images": [Image.fromarray(RAMP.T)]}


@pytest.mark.parametrize(
    ("content", "message", "window"),
    [
        (encoded(np.dstack([RAMP] * 4)), "RGBA", None),
        (encoded(Image.fromarray(np.dstack([RAMP] * 4), "CMYK"), "TIFF"), "CMYK", None),
        (encoded(RAMP > 9), "its pixels are 1", None),
        (encoded(RAMP, "TIFF", **SEVERAL), "2 pages", None),
        (encoded(RAMP, **SEVERAL), "2 pages or frames", None),
        (encoded(np.full((16, 16), np.nan, np.float32), "TIFF"), "pixels that are no numbers", (0, 1)),
        (png(8, 8, (b"IDAT", zlib.compress(bytes(8 * 49))), IEND, kind=(16, 2)), "RGB of 16 bits", None),
        (b"not an image", "cannot identify", None),
        (encoded(noise())[:-60], "truncated", None),
    ],
)
def test_a_broken_file_is_named_and_left_out_only_if_asked(tmp_path: Path, content: bytes, message: str, window: tuple | None):
    source = write_classes(tmp_path / "images")
    (source / "a" / "broken.png").write_bytes(content)
    broken = rf"1 files \(.*broken\.png: cannot be read as an image: .*{message}.*--leave-out-broken"
    refuses(broken, source, window=window)
    arrays = make(source, leave_out_broken=True, window=window)
    assert sum(len(arrays[f"{split}_images"]) for split in SPLITS) == 20
    assert re.search(r"1 left out: cannot be taken\n\n- .*broken\.png", (tmp_path / "out.md").read_text())


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_classes(tmp_path / "images")
    write_image(source / "a" / "bomb.png", noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refuses(r"bomb\.png.*decompression bomb", source)


def test_what_is_left_out_is_listed_and_unlabelled_images_have_no_label(tmp_path: Path):
    source = write_classes(tmp_path / "images")
    for name in (".DS_Store", "a/.DS_Store", "b/Thumbs.db", ".git/x", "README.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    (source / "c").mkdir()
    for name in ("l1", "l2"):  # which lead to images that are read already
        (source / "a" / name).symlink_to(".")
    for number in range(3):
        write_image(source / "unlabelled" / f"{number}.png")
    arrays = make(source)
    assert arrays["class_names"].tolist() == read_source(str(tmp_path / "out.npz")).classes == ["a", "b"]
    assert sum(len(arrays[f"{split}_labels"]) for split in SPLITS) == 20
    assert arrays["unlabelled_images"].shape == (3, 16, 16, 1)
    assert "unlabelled_labels" not in arrays
    summary = (tmp_path / "out.md").read_text()
    assert "4 left out: hidden" in summary
    assert "1 left out: in no folder of a class" in summary
    assert "1 left out: a class without images\n\n- c/" in summary
    assert "| (none)  |" in summary


def test_classes_that_are_numbers_come_in_their_order(tmp_path: Path):
    for label in ("10", "9", "1", "b"):
        for number in range(10):
            write_image(tmp_path / "images" / label / f"{number}.png")
    assert make(tmp_path / "images")["class_names"].tolist() == ["1", "9", "10", "b"]


def test_a_pattern_finds_the_patients_in_names_or_paths(tmp_path: Path):
    source = write_classes(tmp_path / "images", 30)
    for pattern, message in (("ax", "finds no patient in a/a00.png"), ("(", "no regular expression"), (r"[ab]\d", "too few")):
        refuses(message, source, group=pattern)
    for pattern in (r"[ab](\d+)", r"/[ab](\d+)\.png"):
        arrays = make(source, group=pattern)
        assert [len(patients) for patients in groups(arrays)] == [21, 3, 6]


def test_given_splits_stay_and_a_missing_validation_split_is_left_to_fetch_data(tmp_path: Path):
    source = write_splits(tmp_path / "images", ("train", "test"))
    (source / "readme.txt").write_text("who took these")
    arrays = make(source)
    assert {key for key in arrays if key.endswith("_images")} == {"train_images", "test_images"}
    assert len(arrays["train_images"]) == len(arrays["test_images"]) == 40
    assert "left out: in no folder of a class\n\n- readme.txt" in (tmp_path / "out.md").read_text()


def test_given_splits_with_patients_get_a_validation_split_that_parts_none(tmp_path: Path):
    source = write_splits(tmp_path / "images", ("train", "test"))
    refuses("20 patients are in two splits, such as '00'.*test, train", source, group=r"\d+")
    arrays = make(source, group=r"^\w+/./.\d+")
    assert [len(patients) for patients in groups(arrays)] == [36, 4, 40]


LIKE_SPLITS = ("Training", "Test", "validation")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a", "train/b", "val/a"), "there is no image in test"),
        (("train/a", "train/b", "other/a"), "other/ stands beside train/"),
        (("a",), "at least two classes"),
        (("train/a", "train/b", "test/a", "test/c"), "no image of class 2"),
        (("train/a", "train/b", "test/a"), "all of one class"),
        (("a", "b\n"), "printable"),
        ((".hidden/a",), "no images with a label"),
        (("train/a", "train/b", "test/a", "train/unlabelled"), "train/unlabelled/ is in a split"),
        *(
            (("a", f"{split}/b"), f"{split}/ looks like a split: call .* train, val, test, or use --table")
            for split in LIKE_SPLITS
        ),
    ],
)
def test_what_can_be_no_set_is_refused_before_pixels_are_read(tmp_path: Path, names: tuple, message: str, monkeypatch):
    for name in names:
        write_classes(tmp_path / "images" / Path(name).parent, 12, [Path(name).name])
    monkeypatch.setattr("pipeline.fetching.import_images.read_image_file", None)
    refuses(message, tmp_path / "images")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,class\n", r"bad\.csv: no column 'label'; its columns, parted by commas, are 'file', 'class'"),
        ("path,label, label\na/a00.png,a,b\n", r"bad\.csv: column 'label' stands twice"),
        ("path;label\n", r"bad\.csv: no column 'label'; its columns, parted by commas, are 'path;label'"),
        ("path,label\na/a00.png,a, mild\n", r"bad\.csv: cannot be read as a table"),
        ("path,label\na/a00.png,a\na/a01.png,\n", "label is empty in row 3"),
        ("path,label,patient\na/a00.png,a,x\na/a01.png,a, \n", "patient is empty in row 3"),
        ("path,label,split\na/a00.png,a,valid\n", "split 'valid' in row 2: train, val, test"),
        ("path,label\na/a00.png,a\n./a/a00.png,a\n", "a/a00.png stands twice, the second time in row 3"),
        ("path,label\nnone.png,a\n", r"none\.png: cannot be read as an image: no such file"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_its_row(tmp_path: Path, text: str, message: str):
    (tmp_path / "bad.csv").write_text(text)
    refuses(message, write_classes(tmp_path / "images"), table=tmp_path / "bad.csv")


def test_a_table_may_say_the_splits_and_leaves_out_what_it_does_not_name(tmp_path: Path):
    splits = ["train"] * 20 + ["val"] * 4 + ["test"] * 6
    rows = [{"path": f"x/{n}.png", "label": "ab"[n % 2], "split": split, "age": "7"} for n, split in enumerate(splits)]
    for name in [*(row["path"] for row in rows), "x/other.png", "unlabelled/u.png"]:
        write_image(tmp_path / "images" / name)
    arrays = make(tmp_path / "images", table=write_table(tmp_path / "images" / "labels.csv", rows))
    assert [len(arrays[f"{part}_images"]) for part in (*SPLITS, "unlabelled")] == [20, 4, 6, 1]
    assert "1 left out: not in the table\n\n- x/other.png" in (tmp_path / "out.md").read_text()


def test_a_tables_paths_may_be_absolute_and_its_columns_have_spaces_around_them(tmp_path: Path):
    source = write_classes(tmp_path / "images")
    rows = [{" path": str(path), " label ": path.parent.name, " patient": str(n)} for n, path in enumerate(source.rglob("*.png"))]
    arrays = make(source, table=write_table(tmp_path / "labels.csv", rows))
    assert sum(map(len, groups(arrays))) == 20
    assert "left out" not in (tmp_path / "out.md").read_text()
    with pytest.raises(UserError, match="stands twice"):
        make(source, table=write_table(tmp_path / "labels.csv", [*rows, rows[0] | {" path": "a/a00.png"}]))


def test_unlabelled_images_of_patients_in_val_and_test_are_left_out(tmp_path: Path):
    source = write_classes(tmp_path / "images", 20)
    for number in range(20):
        write_image(source / "unlabelled" / f"a{number:02}.png")
    arrays = make(source, group=r"\w\d+")
    assert len(arrays["unlabelled_images"]) == sum(name.startswith("a") for name in arrays["train_groups"].tolist())
    assert "left out: unlabelled, of a patient in val or test" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_equal_images_in_two_splits_are_listed_and_refused_unless_asked(tmp_path: Path, suffix: str):
    source = write_splits(tmp_path / "images")
    Image.open(source / "train" / "a" / "a03.png").save(source / "test" / "b" / f"copy{suffix}")
    (source / "unlabelled").mkdir()
    shutil.copy(source / "train" / "a" / "a04.png", source / "unlabelled")  # to train on an image twice is no fault
    refuses(rf"1 images \(test: test/b/copy\{suffix} = train: train/a/a03\.png\) in two splits.*--allow-dup", source)
    make(source, allow_duplicates=True)
    assert f"1 equal images in two splits\n\n- test: test/b/copy{suffix} = train: train" in (tmp_path / "out.md").read_text()


def test_images_are_resized_by_the_rule_that_the_file_names(tmp_path: Path):
    source, turned = tmp_path / "images", Image.Exif()
    turned[0x112] = 6
    for label in "ab":
        for number in range(10):
            write_image(source / label / f"{number}.png", noise(30, 20, 3), exif=turned)
    for rule in ("pad", "crop", "stretch"):
        arrays = make(source, resize=rule, channels=1)
        assert str(arrays["resize"]) == read_source(str(tmp_path / "out.npz")).resize == rule
        expected = [fit_image(Image.open(path), (16, 16), rule, 1) for path in (source / "a").iterdir()]
        assert any(np.array_equal(arrays["test_images"][0], image) for image in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "--size 4: 8 to 4096"),
        ({"window": (5, 5)}, "--window 5 5"),
        ({"source": "none"}, "none: there is no such folder"),
        ({"out": "out.npy"}, "a file name that ends in .npz"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, options: dict, message: str):
    arguments = {"source": write_classes(tmp_path / "images", 1), "out": "out.npz"} | options
    arguments |= {key: tmp_path / arguments[key] for key in ("source", "out")}
    with pytest.raises(UserError, match=message):
        main(**arguments)
