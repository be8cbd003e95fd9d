from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.params import load_params, without_place

PARAMS = (Path(__file__).parents[1] / "params.yaml").read_text()


def load_changed(tmp_path: Path, old: str, new: str):
    assert old in PARAMS
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace(old, new, 1))
    return load_params(path)


def test_defaults_are_those_of_the_original_course_project_and_five_seeds():
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    assert params.seeds == [0, 1, 2, 3, 4]
    assert params.kd.model_dump() == {"temperature": 5, "alpha": 0.7, "divergence": "forward", "logit_standardization": False}
    assert (params.baselines.epochs, params.baselines.batch_size, params.baselines.lr) == (5, 64, 0.001)
    assert (params.distillation.epochs, params.distillation.batch_size, params.distillation.lr) == (5, 128, 0.001)
    assert params.network("distillation", "teacher") == ("compact_cnn", {"width": 32, "hidden": 128})
    assert params.network("distillation", "student_alone") == ("compact_cnn", {"width": 16, "hidden": 64})


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("temperature: 5 ", "temprature: 6 ", ["kd.temprature = 6", "kd.temperature is missing"]),
        ("distill:", "extra: 1\ndistill:", ["extra = 1 is not a parameter"]),
        ("epochs: 5", "epochs: five", ["baselines.epochs = 'five'", "integer"]),
        ("epochs: 5", "epochs: 0", ["baselines.epochs = 0", "greater than or equal to 1"]),
        ("pretrained: true", "pretrained: 1", ["baselines.pretrained = 1", "boolean"]),
        ("alpha: 0.7", "alpha: 1.5", ["kd.alpha = 1.5", "less than or equal to 1"]),
        ("temperature: 5", "temperature: .nan", ["kd.temperature = nan", "finite"]),
        ("divergence: forward", "divergence: sideways", ["kd.divergence = 'sideways'", "'forward' or 'reverse'"]),
        ("seeds: [0, 1, 2, 3, 4]", "seeds: [0, 1, 1]", ["seeds = [0, 1, 1]", "twice"]),
        ("size: 28", "size: 32", ["baselines.size = 32", "28, 64, 128 or 224"]),
        ("logits: null          #", "logits: ''  #", ["teacher.logits = ''"]),
        ("jobs: auto", "jobs: 0", ["jobs", "greater than or equal to 1"]),
        ("seeds: [0, 1, 2, 3, 4]", "seeds: []", ["seeds = []"]),
        ("seeds: [0, 1, 2, 3, 4]", "seeds: [010, 011]", ["010 is one number by YAML 1.1"]),
        ("epochs: 5", "epochs: 1:30", ["1:30 is one number by YAML 1.1"]),
    ],
)
def test_bad_parameters_are_named(tmp_path: Path, old: str, new: str, named: list[str]):
    with pytest.raises(UserError) as caught:
        load_changed(tmp_path, old, new)
    for text in named:
        assert text in str(caught.value)


def test_a_teacher_has_logits_or_features(tmp_path: Path):
    both = PARAMS.replace("logits: null", "logits: a.npz").replace("features: null", "features: /b/c.npz")
    (tmp_path / "params.yaml").write_text(both)
    with pytest.raises(UserError, match=r"teacher = .*logits or features: one of them is wanted"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(both.replace("logits: a.npz", "logits: null"))
    params = load_params(tmp_path / "params.yaml")
    assert params.teacher.file == Path("/b/c.npz")
    assert params.flat("teacher.logits", "teacher.features") == {"teacher.logits": None, "teacher.features": "c.npz"}


def test_exponents_without_a_point_are_numbers_as_dvc_writes_them(tmp_path: Path):
    assert load_changed(tmp_path, "lr: 0.001", "lr: 1e-05").baselines.lr == 1e-5


def test_a_missing_file_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_flat_names_every_value_of_a_block():
    flat = load_params(Path(__file__).parents[1] / "params.yaml").flat("kd", "baselines.resnet18", "device")
    kd = {"kd.temperature": 5, "kd.alpha": 0.7, "kd.divergence": "forward", "kd.logit_standardization": False}
    assert flat == kd | {"baselines.resnet18.stem": "imagenet", "device": "auto"}


def test_a_record_does_not_say_where_a_file_of_the_users_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    places = {"mnist": "mnist", "data/a.npz": "data/a.npz", f"{tmp_path}/data/a.npz": "data/a.npz"}
    places |= {"/home/someone/a.npz": "a.npz", "~/sets/a.npz": "a.npz", "../b/a.npz": "a.npz", "x/../../b/a.npz": "a.npz"}
    assert {place: without_place(place) for place in places} == places
    params = load_changed(tmp_path, "dataset: pathmnist", "dataset: /home/someone/a.npz")
    assert params.flat("baselines")["baselines.dataset"] == "a.npz"
    assert params.values("baselines")["baselines.dataset"] == "/home/someone/a.npz"
