import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.fetching.preparation import prepare
from pipeline.fetching.sources import read_source
from pipeline.networks.description import read_description
from pipeline.training import recipe as module
from pipeline.training.cache import Record, read_record
from pipeline.training.recipe import Recipe, train
from tests.conftest import write_npz
from tests.training.conftest import SETTINGS


def key(recipe: Recipe, root: Path) -> str:
    return read_description(train(recipe, root, lambda record: None)).digest


def test_a_training_leaves_checkpoint_and_record(teacher: Recipe, tmp_path: Path):
    records: list[Record] = []
    path = train(teacher, tmp_path / "root", lambda record: records.append(record.model_copy(deep=True)))
    description = read_description(path)
    assert [len(record.history) for record in records] == [0, 1, 2, 2]
    assert records[-1] == read_record(tmp_path / "root", description.digest)
    assert records[-1].checkpoint_md5 == md5(path)
    assert records[-1].started > 0 < records[-1].seconds
    assert len(records[-1].loads) == 2
    assert Record.of_checkpoint(path) == records[-1].model_copy(update={"started": None, "seconds": None, "loads": []})


def test_a_finished_training_is_taken_from_the_cache(teacher: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = train(teacher, tmp_path / "root", lambda record: None).read_bytes()
    monkeypatch.setattr(module, "_carry_out", None)
    records = []
    assert train(teacher, tmp_path / "root", records.append).read_bytes() == before
    assert [record.finished for record in records] == [True]


class KilledError(Exception):
    pass


def test_an_interrupted_training_resumes_to_the_same_bytes(teacher: Recipe, tmp_path: Path):
    def interrupt(record: Record) -> None:
        if len(record.history) == 1:
            raise KilledError

    with pytest.raises(KilledError):
        train(teacher, tmp_path / "root", interrupt)
    seen = []
    path = train(teacher, tmp_path / "root", lambda record: seen.append(len(record.history)))
    assert seen == [1, 2, 2]
    assert path.read_bytes() == train(teacher, tmp_path / "other", lambda record: None).read_bytes()
    record = read_record(tmp_path / "root", path.parent.name)
    assert len(record.loads) == 2


def test_a_loss_that_is_not_finite_is_recorded_and_told(teacher: Recipe, tmp_path: Path):
    records = []
    wild = dataclasses.replace(teacher, settings=SETTINGS | {"lr": 1e30})
    with pytest.raises(UserError, match="not finite at a learning rate of 1e"):
        train(wild, tmp_path / "root", records.append)
    assert "not finite" in records[-1].failed


def test_the_digest_changes_with_whatever_decides_the_training(teacher: Recipe, tmp_path: Path, monkeypatch):
    root = tmp_path / "root"
    student = {"kd": {"temperature": 5.0, "alpha": 0.7, "divergence": "forward"}, "model": "student_distilled"}
    path = train(teacher, root, lambda record: None)
    other = train(dataclasses.replace(teacher, seed=1), root, lambda record: None)
    distilled = dataclasses.replace(teacher, **student, teachers=(path,))
    write_npz(tmp_path / "more.npz", val_images=None, val_labels=None)
    prepare(read_source(str(tmp_path / "more.npz")), 0.1, tmp_path / "more")
    varied = [
        teacher,
        dataclasses.replace(teacher, seed=1),
        dataclasses.replace(teacher, data=tmp_path / "more"),
        dataclasses.replace(teacher, threads=2),
        dataclasses.replace(teacher, label_fraction=0.5),
        dataclasses.replace(teacher, settings=SETTINGS | {"lr": 0.02}),
        dataclasses.replace(teacher, arguments={"width": 5, "hidden": 8}),
        distilled,
        dataclasses.replace(distilled, kd=student["kd"] | {"temperature": 6.0}),
        dataclasses.replace(distilled, teachers=(other,)),
        dataclasses.replace(distilled, teachers=(path, other)),
        dataclasses.replace(teacher, label_smoothing=0.1),
        dataclasses.replace(teacher, class_weights="balanced"),
        dataclasses.replace(teacher, augmentation="shifts"),
    ]
    keys = [key(recipe, root) for recipe in varied]
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(module, "code_digest", lambda packages: "edited")
    assert key(teacher, root) not in keys
    torch.set_num_threads(1)


def test_seeds_of_one_setting_share_its_name(teacher: Recipe, tmp_path: Path):
    root = tmp_path / "root"
    paths = [train(dataclasses.replace(teacher, seed=seed), root, lambda record: None) for seed in (0, 1)]
    kd = {"temperature": 5.0, "alpha": 0.7, "divergence": "forward"}
    students = [
        train(dataclasses.replace(teacher, model="s", seed=seed, kd=kd, teachers=(path,)), root, lambda record: None)
        for seed, path in enumerate(paths)
    ]
    for checkpoints in (paths, students):
        descriptions = [read_description(path) for path in checkpoints]
        assert descriptions[0].setting == descriptions[1].setting
        assert descriptions[0].digest != descriptions[1].digest
    assert read_description(students[1]).teachers_md5 == [md5(paths[1])]
