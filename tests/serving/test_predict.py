"""Prediction on image files: tests/test_graph.py runs the command."""

import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.images import fit_image
from pipeline.serving import predict
from pipeline.serving.predict import read_image

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)
ORIENTATION = 0x112  # EXIF


@pytest.mark.parametrize(
    ("image", "shape", "expected"),
    [
        (Image.fromarray(GREY), (8, 8, 1), GREY[..., None]),
        (Image.fromarray(GREY), (8, 8, 3), np.repeat(GREY[..., None], 3, axis=2)),
        (Image.fromarray(COLOUR), (8, 8, 3), COLOUR),
        (Image.fromarray(COLOUR), (8, 8, 1), np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None]),
        (Image.fromarray(GREY).convert("P"), (8, 8, 1), GREY[..., None]),
    ],
)
def test_pixels_are_taken_as_the_rule_says(tmp_path: Path, image: Image.Image, shape: tuple, expected: np.ndarray):
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", shape), expected)


def test_a_cameras_orientation_is_followed(tmp_path: Path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(GREY[:, :5]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (5, 8, 1))[..., 0], np.rot90(GREY[:, :5], -1))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY.astype(np.uint16) * 256),
        Image.fromarray(np.dstack([COLOUR, GREY])),
        Image.fromarray(np.dstack([GREY, GREY]), "LA"),
        Image.fromarray(GREY > 9),
    ],
)
def test_other_pixels_are_refused(tmp_path: Path, image: Image.Image):
    image.save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: cannot be read as an image: its pixels are .*; 8-bit grey"):
        read_image(tmp_path / "a.png", (8, 8, 1))


@pytest.mark.parametrize("rule", ["pad", "crop", "stretch"])
def test_another_size_is_refused_or_resized_by_the_students_rule(tmp_path: Path, rule: str):
    Image.fromarray(np.tile(GREY, (3, 2))).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*16x24 pixels; the student takes 24x16"):
        read_image(tmp_path / "a.tif", (16, 24, 1))
    expected = fit_image(Image.fromarray(np.tile(GREY, (3, 2))), (16, 24), rule, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", (16, 24, 1), rule), expected)


class FakeStudent:
    shape, classes, path, resize = (8, 8, 1), ["=cmd|' /C calc'!A0", "two"], Path("student.onnx"), None

    def __init__(self, _: Path) -> None:
        pass

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return np.tile(np.array([[0.75, 0.25]], np.float32), (len(images), 1))


def test_every_image_has_a_row_and_every_other_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(predict, "open_foreign", FakeStudent)
    for name in (b"b.PNG", b"a.jpg", b"=1+1.png", b"\xff.png"):
        with Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).open("wb") as file:
            Image.fromarray(GREY).save(file, "JPEG" if name.endswith(b"jpg") else "PNG")
    (tmp_path / "notes.txt").touch()
    predict.main(str(tmp_path))
    printed = capsys.readouterr()
    table = pd.read_csv(io.StringIO(printed.out))
    assert table["file"].tolist() == ["'=1+1.png", "a.jpg", "b.PNG", r"\udcff.png"]
    assert set(table["class"]) == {"'=cmd|' /C calc'!A0"}
    assert [line.endswith("notes.txt: no PNG, JPEG or TIFF") for line in printed.err.splitlines()] == [True]


def test_probabilities_that_are_no_numbers_are_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeStudent, "probabilities", lambda self, images: np.full((len(images), 2), np.nan))
    monkeypatch.setattr(predict, "open_foreign", FakeStudent)
    Image.fromarray(GREY).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no numbers"):
        predict.main(str(tmp_path))


def test_an_image_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.png.*not a file"):
            read_image(tmp_path / f"{name}.png", (28, 28, 1))
