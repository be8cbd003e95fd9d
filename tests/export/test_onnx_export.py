import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data.prepared import TrainingData
from pipeline.export import onnx_model
from pipeline.export.inference_cost import inference_costs
from pipeline.export.onnx_export import check_export, export_onnx, quantize
from pipeline.export.onnx_model import Student, open_foreign
from pipeline.networks.architectures import Classifier
from pipeline.networks.checkpoints import new_classifier
from pipeline.networks.inference import predict
from pipeline.networks.names import architecture_arguments


@pytest.fixture(scope="module")
def classifier(data: TrainingData) -> Classifier:
    return new_classifier("compact_cnn", {"width": 24, "hidden": 64}, data.dataset, 0)


@pytest.fixture(scope="module")
def exported(classifier: Classifier, data: TrainingData, tmp_path_factory: pytest.TempPathFactory):
    """A student's file, and PyTorch's probabilities of the validation images."""
    folder = tmp_path_factory.mktemp("onnx")
    for name in ("student", "again"):
        export_onnx(classifier, data.dataset.image_shape, data.dataset.classes, folder / f"{name}.onnx")
    return folder / "student.onnx", predict(classifier, data.val.images).softmax(dim=1).numpy()


@pytest.mark.parametrize("count", [1, 2, 100])
def test_raw_images_give_pytorchs_probabilities(exported, data: TrainingData, count: int):
    path, expected = exported
    probabilities = Student(path).probabilities(data.val.images[:count].numpy())
    np.testing.assert_allclose(probabilities, expected[:count], atol=1e-6)


SLOW = ("resnet50", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_0", "densenet121")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_torchvisions_networks_give_pytorchs_probabilities(name: str, data: TrainingData, tmp_path: Path):
    dataset = data.dataset.model_copy(update={"image_shape": (64, 64, 3)})
    classifier = new_classifier(name, architecture_arguments(name, {"stem": "cifar"}), dataset, 0)
    images = torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # one forward pass gives the statistics of these images: with those at first, all look alike
    classifier.train()(images)
    expected = predict(classifier, images).softmax(dim=1).numpy()
    export_onnx(classifier, dataset.image_shape, dataset.classes, tmp_path / "student.onnx")
    actual = open_foreign(tmp_path / "student.onnx").probabilities(images.numpy())
    assert np.abs(actual - expected).max() < 0.01 * expected.std(axis=0).mean(), "next to how much images differ"


def test_int8_is_smaller_and_close_whatever_the_number_of_threads(
    exported, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Options(onnxruntime.SessionOptions):
        threads = 1

        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = self.threads

    path, expected = exported
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)  # what quantize_static opens its session with
        for Options.threads in (1, 2, 5):
            quantize(path, data.train.images.numpy(), tmp_path / f"{Options.threads}.onnx")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    assert (tmp_path / "1.onnx").stat().st_size < 0.5 * path.stat().st_size
    student = Student(tmp_path / "1.onnx", threads=3)
    assert student.session.get_session_options().intra_op_num_threads == 3
    assert np.abs(student.probabilities(data.val.images.numpy()) - expected).max() < 0.05


def test_equal_weights_give_equal_bytes_that_name_no_place(exported, data: TrainingData):
    content = exported[0].read_bytes()
    assert exported[0].with_stem("again").read_bytes() == content
    assert b".py" not in content
    assert json.loads(onnx.load(exported[0]).metadata_props[0].value) == data.dataset.classes


def test_the_rule_of_resizing_is_in_the_file_and_the_temperature_in_its_graph_too(
    exported, classifier: Classifier, data: TrainingData, tmp_path: Path
):
    assert (Student(exported[0]).resize, Student(exported[0]).temperature) == (None, 1)
    a, b, images, classes = tmp_path / "a.onnx", tmp_path / "b.onnx", data.val.images, data.dataset.classes
    export_onnx(classifier, data.dataset.image_shape, classes, a, "crop", 0.1)
    quantize(a, data.train.images.numpy(), b)
    expected = (predict(classifier, images) / 0.1).softmax(dim=1).numpy()
    assert np.abs(expected - exported[1]).max() > 0.1
    for path, tolerance in ((a, 1e-6), (b, 0.02)):
        student = open_foreign(path)
        assert (student.resize, student.temperature) == ("crop", 0.1)
        np.testing.assert_allclose(student.probabilities(images.numpy()), expected, atol=tolerance)


TWICE = json.dumps(["a"] * 10)
UNFIT = [("temperature", "0"), ("temperature", "nan"), ("temperature", "hot"), ("resize", "squeeze"), ("classes", TWICE)]


@pytest.mark.parametrize(("key", "value"), UNFIT)
def test_what_a_file_says_of_itself_is_checked(exported, data: TrainingData, tmp_path: Path, key: str, value: str):
    model, path = onnx.load(exported[0]), tmp_path / "other.onnx"
    older = {"classes": json.dumps(data.dataset.classes)}
    onnx.helper.set_model_props(model, older)
    path.write_bytes(model.SerializeToString())
    assert Student(path).temperature == 1
    onnx.helper.set_model_props(model, older | {key: value})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"other\.onnx: damaged, or no exported student"):
        open_foreign(path)


def test_an_exported_student_is_measured_without_pytorch(exported):
    (cost,) = inference_costs(exported[:1])
    assert 0 < cost["latency_ms"] <= cost["latency_p95_ms"]
    assert cost["images_per_second"] > 200 / cost["latency_ms"], "of images, not of batches"
    assert cost.get("peak_memory_mib", 100) < 150, "PyTorch alone takes more"


def test_a_damaged_file_among_those_measured_is_named_and_nobody_waits(exported, tmp_path: Path, capfd):
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.onnx: could not be measured, see above"):
        inference_costs([exported[0], tmp_path / "a.onnx", exported[0]])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert ["a.onnx: damaged, or no exported student" in line for line in lines] == [True]


@pytest.mark.slow
def test_a_student_that_cannot_be_exported_is_refused_before_it_is_trained():
    check_export("mobilenet_v3_small", {}, (64, 64, 1), 3)
    with pytest.raises(UserError, match="student: vgg11 cannot be exported as an ONNX file that this project opens"):
        check_export("vgg11", {}, (64, 64, 3), 3)


def test_a_file_that_might_compute_forever_is_not_opened(exported, tmp_path: Path):
    assert open_foreign(exported[0]).classes == Student(exported[0]).classes
    model, body = onnx.load(exported[0]), onnx.GraphProto(name="forever")
    loop = onnx.helper.make_node("Loop", ["", ""], ["x"], body=body)
    for node, named in ((loop, "Loop"), (onnx.helper.make_node("Relu", ["x"], ["y"], domain="elsewhere"), r"elsewhere\.Relu")):
        other = onnx.ModelProto()
        other.CopyFrom(model)
        other.graph.node.append(node)
        (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
        with pytest.raises(UserError, match=rf"other\.onnx.*computes with {named}"):
            open_foreign(tmp_path / "other.onnx")


def test_a_file_that_takes_too_much_is_not_opened(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It computes products that are the same for every image, which the trial does when it opens the file."""
    model, path, side = onnx.load(exported[0]), tmp_path / "other.onnx", 5000
    for name, shape in (("row", (1, side)), ("column", (side, 1))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    names = [f"power{number}" for number in range(30)]
    model.graph.node.append(onnx.helper.make_node("Add", ["row", "column"], names[:1]))
    model.graph.node.extend(onnx.helper.make_node("MatMul", [a, a], [b]) for a, b in itertools.pairwise(names))
    model.graph.output.append(onnx.helper.make_tensor_value_info(names[-1], onnx.TensorProto.FLOAT, (side, side)))
    path.write_bytes(model.SerializeToString())
    monkeypatch.setattr(onnx_model, "TRIAL_SECONDS", 3)
    with pytest.raises(UserError, match="takes over 3 s"):
        open_foreign(path)
