"""Prediction on image files: tests/test_graph.py runs the command on a folder.

Which pixels are read and how they are resized: tests/fetching/test_import_images.py, tests/core/test_images.py.
"""

import io
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from onnxruntime import InferenceSession
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.images import fit_image
from pipeline.serving import predict
from pipeline.serving.predict import read_image
from tests.conftest import ROOT

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
NEEDED = {"onnxruntime", "numpy", "pillow", "flatbuffers", "packaging", "protobuf"}  # with what onnxruntime needs itself
ORIENTATION = 0x112  # EXIF


def test_a_cameras_orientation_is_followed(tmp_path: Path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(GREY[:, :5]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (5, 8, 1))[..., 0], np.rot90(GREY[:, :5], -1))


@pytest.mark.parametrize("rule", ["pad", "crop", "stretch"])
def test_another_size_is_refused_or_resized_by_the_students_rule(tmp_path: Path, rule: str):
    Image.fromarray(np.tile(GREY, (3, 2))).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*16x24 pixels; the student takes 24x16"):
        read_image(tmp_path / "a.tif", (16, 24, 1))
    expected = fit_image(Image.fromarray(np.tile(GREY, (3, 2))), (16, 24), rule, 1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", (16, 24, 1), rule), expected)


class FakeStudent:
    shape, classes, path, resize = (8, 8, 1), ["=cmd|' /C calc'!A0", "two"], Path("student.onnx"), None
    row = np.array([0.75, 0.25], np.float32)

    def __init__(self, _: Path) -> None:
        pass

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return np.tile(self.row, (len(images), 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with student.onnx, which answers as a FakeStudent."""
    monkeypatch.setattr(predict, "open_foreign", FakeStudent)
    monkeypatch.chdir(tmp_path)
    Path("student.onnx").touch()
    return tmp_path


def test_every_image_has_a_row_and_every_other_file_is_named(folder: Path, capsys):
    for name in (b"b.PNG", b"a.jpg", b"=1+1.png", b"\xff.png"):
        with Path(os.fsdecode(name)).open("wb") as file:
            Image.fromarray(GREY).save(file, "JPEG" if name.endswith(b"jpg") else "PNG")
    Path("notes.txt").touch()
    with pytest.raises(UserError, match=r"other\.onnx: no such file: there are student\.onnx"):
        predict.main([Path()], Path("other.onnx"))
    with pytest.raises(UserError, match=r"other\.onnx: no such file: dvc repro export_student or"):
        predict.main([Path()], Path("none/other.onnx"))
    predict.main([Path()], Path("student.onnx"))
    printed = capsys.readouterr()
    table = pd.read_csv(io.StringIO(printed.out))
    assert table["file"].tolist() == ["'=1+1.png", "a.jpg", "b.PNG", r"\udcff.png"]
    assert set(table["class"]) == {"'=cmd|' /C calc'!A0"}
    left_out = [Path(line.split(": ")[1]).name for line in printed.err.splitlines()]
    assert left_out == ["notes.txt", "student.onnx"]


def test_broken_images_are_named_together_and_left_out_if_asked(folder: Path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(GREY).save(name) if name == "b.png" else Path(name).touch()
    with pytest.raises(
        UserError, match=r"a\.png: cannot be read.*; c\.png: cannot be read.*: --leave-out-broken predicts the others"
    ):
        predict.main([Path()], Path("student.onnx"))
    assert capsys.readouterr().out == ""
    predict.main([Path()], Path("student.onnx"), leave_out_broken=True)
    printed = capsys.readouterr()
    assert [line.split(",")[0] for line in printed.out.splitlines()] == ["file", "b.png"]
    assert sum("cannot be read as an image" in line for line in printed.err.splitlines()) == 2
    with pytest.raises(UserError, match=r"^a\.png: (?!.*--leave-out)"):
        predict.main([Path("a.png")], Path("student.onnx"), leave_out_broken=True)


def test_a_file_that_cannot_be_looked_into_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def is_dicom(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(predict, "is_dicom", is_dicom)
    for name in ("a.png", "notes", "DICOMDIR"):
        (tmp_path / name).touch()
    assert predict.images_in(tmp_path) == [tmp_path / "a.png"]
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("window", [(0, float("inf")), (float("nan"), 9), (9, 9), (9, 0), (0, 1e-320)])
def test_a_window_that_is_none_is_refused_before_anything_is_read(window: tuple[float, float]):
    with pytest.raises(UserError, match=r"--window .*: two numbers are wanted, the lower first"):
        predict.main([Path("missing.png")], Path("missing.onnx"), window=window)


def test_probabilities_that_are_no_numbers_are_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeStudent, "row", np.full(2, np.nan))
    Image.fromarray(GREY).save("a.png")
    with pytest.raises(UserError, match="no numbers"):
        predict.main([Path("a.png")], Path("student.onnx"))


def without_other_packages(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Run the command where no package of this environment can be imported but NEEDED."""
    others = [name for name, of in packages_distributions().items() if not NEEDED & {package.lower() for package in of}]
    code = "import runpy, sys; sys.argv[0] = '-m'; sys.orig_argv = ['pipeline.serving.predict']; "
    code += f"sys.modules |= dict.fromkeys({others}); runpy.run_module('pipeline.serving.predict', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_published_model_needs_three_packages(tmp_path: Path):
    session = InferenceSession(ROOT / "models/student/baselines.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (1, *session.get_inputs()[0].shape[1:]), np.uint8)
    image = Image.fromarray(pixels[0].squeeze())
    image.save(tmp_path / "a.png")
    image.resize((50, 40)).save(tmp_path / "b.tif")
    done = without_other_packages(tmp_path / "a.png", tmp_path, "--resize", "crop")
    assert "model: models/student/baselines.onnx" in done.stderr
    (expected,) = session.run(None, {"images": pixels})
    table = pd.read_csv(io.StringIO(done.stdout))
    assert table["file"].tolist() == [str(tmp_path / name) for name in ("a.png", "a.png", "b.tif")]
    np.testing.assert_allclose(table.iloc[:2, 2:], np.repeat(expected, 2, axis=0), atol=1e-6)
    (tmp_path / "foreign.onnx").touch()
    foreign = without_other_packages(tmp_path / "a.png", "--model", tmp_path / "foreign.onnx")
    assert foreign.stderr.splitlines() == [
        f"error: {tmp_path}/foreign.onnx: to try a file that is not in models/student: "
        "import of onnx halted; None in sys.modules: pip install onnx"
    ]


def test_an_image_that_is_a_folder_or_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.png.*(not a|no such) file"):
            read_image(tmp_path / f"{name}.png", (28, 28, 1))
