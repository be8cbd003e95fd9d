import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.data.prepared import TrainingData
from pipeline.export.onnx_export import export_onnx, quantize
from pipeline.export.onnx_model import Student
from pipeline.networks.checkpoints import new_classifier
from pipeline.networks.inference import predict


@pytest.fixture(scope="module")
def exported(data: TrainingData, tmp_path_factory: pytest.TempPathFactory):
    classifier = new_classifier("compact_cnn", {"width": 24, "hidden": 64}, data.dataset, 0).eval()
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, path)
    return classifier, path


@pytest.mark.parametrize("count", [1, 2, 100])
def test_raw_images_give_pytorchs_probabilities(exported, data: TrainingData, count: int):
    classifier, path = exported
    images = data.val.images[:count]
    expected = torch.softmax(predict(classifier, images), dim=1).numpy()
    np.testing.assert_allclose(Student(path).probabilities(images.numpy()), expected, atol=1e-6)


def test_int8_is_smaller_and_close(exported, data: TrainingData, tmp_path: Path):
    classifier, path = exported
    quantize(path, data.train.images.numpy(), data.dataset.classes, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size
    expected = torch.softmax(predict(classifier, data.val.images), dim=1).numpy()
    assert np.abs(Student(tmp_path / "int8.onnx").probabilities(data.val.images.numpy()) - expected).max() < 0.05


def test_the_int8_model_does_not_depend_on_the_number_of_threads(
    exported, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Options(onnxruntime.SessionOptions):
        threads = 1

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = self.threads

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)  # what quantize_static opens its session with
    for Options.threads in (1, 2, 5):
        quantize(exported[1], data.train.images.numpy(), data.dataset.classes, tmp_path / f"{Options.threads}.onnx")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert Student(exported[1], threads=3).session.get_session_options().intra_op_num_threads == 3


def test_equal_weights_give_equal_bytes_that_name_no_place(exported, data: TrainingData, tmp_path: Path):
    classifier, path = exported
    export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, tmp_path / "again.onnx")
    content = path.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == content
    assert b".py" not in content
    assert json.loads(onnx.load(path).metadata_props[0].value) == data.dataset.classes


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "pipeline", "scipy", "sklearn", "pandas"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = np.load(sys.argv[2])
print(session.run(None, {"images": images})[0].argmax(1).tolist())
"""


def test_onnxruntime_and_numpy_are_enough(exported, data: TrainingData, tmp_path: Path):
    classifier, path = exported
    np.save(tmp_path / "images.npy", data.val.images.numpy())
    command = [sys.executable, "-c", ALONE, str(path), str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == predict(classifier, data.val.images).argmax(1).tolist()
