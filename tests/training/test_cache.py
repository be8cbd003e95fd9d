import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.core.files import md5
from pipeline.data.prepared import TrainingData
from pipeline.networks.checkpoints import new_classifier, save_checkpoint
from pipeline.training.cache import Record, open_entry, prune, read_record, working_place
from tests.networks.conftest import ARGUMENTS, describe


@pytest.fixture
def record(data: TrainingData) -> Record:
    names = {"digest": "abc", "setting": "def", "model": "teacher", "architecture": "compact_cnn", "device": "cpu"}
    return Record(format=4, **names, arguments={}, dataset=data.dataset, seed=0, parameters={}, epochs=2)


def test_what_is_saved_is_found_again(tmp_path: Path, record: Record):
    with open_entry(tmp_path, "abc") as entry:
        assert entry.load() is None
        entry.save(record, {"model": {"weight": torch.ones(2)}, "epoch": 1})
    with open_entry(tmp_path, "abc") as entry:
        saved, state = entry.load()
        assert state["epoch"] == 1
        assert torch.equal(state["model"]["weight"], torch.ones(2))
        assert entry.record == saved == record
        assert not entry.is_finished()
    with open_entry(tmp_path, "another") as entry:
        assert entry.load() is None


def test_what_is_damaged_or_no_state_is_none_and_no_code_in_it_is_run(tmp_path: Path, record: Record):
    with open_entry(tmp_path, "abc") as entry:
        entry.save(record, {"model": torch.ones(2)})
        whole = entry.state.read_bytes()
        for damaged in (whole[:-4], whole[:-4] + b"\0\1\2\3", b"", hashlib.sha256(b"garbage").digest() + b"garbage"):
            entry.state.write_bytes(damaged)
            assert entry.load() is None
        entry.save(record, {"model": Path("x")})
        assert entry.load() is None
        entry.save(record.model_copy(update={"digest": "of-another"}), {})
        assert entry.load() is None


def test_a_finished_training_needs_its_own_checkpoint_whole(tmp_path: Path, record: Record, data: TrainingData):
    description = describe(data.dataset, "abc")
    finished = Record(**description.model_dump(), epochs=1)
    with open_entry(tmp_path, "abc") as entry:
        entry.save(finished, {})
        save_checkpoint(entry.checkpoint, new_classifier("compact_cnn", ARGUMENTS, data.dataset, 0), description)
        entry.write(finished.model_copy(update={"checkpoint_md5": md5(entry.checkpoint)}))
        assert not entry.state.exists()
    with open_entry(tmp_path, "abc") as entry:
        assert entry.is_finished()
        whole = entry.checkpoint.read_bytes()
        entry.checkpoint.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the last weight
        assert not entry.is_finished()
        for other in (b"other", whole.replace(b"abc", b"abd")):
            entry.checkpoint.write_bytes(other)
            assert not entry.is_finished()
            entry.record.checkpoint_md5 = md5(entry.checkpoint)
            assert not entry.is_finished()
        entry.checkpoint.unlink()
        os.mkfifo(entry.checkpoint)  # that nobody writes to
        assert not entry.is_finished()


@pytest.mark.parametrize(
    "wrong", ["{", '{"digest": "of-another"}', '{"history": [], "checkpoint_md5": "a"}', '{"best_epoch": 2}']
)
def test_a_record_that_is_damaged_or_of_another_training_is_none(tmp_path: Path, data: TrainingData, wrong: str):
    whole = Record(**describe(data.dataset, "abc").model_dump(), epochs=1, checkpoint_md5="a").model_dump_json()
    path = tmp_path / "abc" / "record.json"
    path.parent.mkdir()
    path.write_text(whole)
    assert read_record(tmp_path, "abc")
    path.write_text(json.dumps(json.loads(whole) | json.loads(wrong)) if wrong != "{" else wrong)
    assert read_record(tmp_path, "abc") is None


def test_retrain_forgets_what_is_there(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch):
    with open_entry(tmp_path, "abc") as entry:
        entry.save(record, {})
    monkeypatch.setenv("RETRAIN", "1")
    with open_entry(tmp_path, "abc") as entry:
        assert entry.record is None


def test_a_second_process_waits_and_says_so(tmp_path: Path):
    """Here a second thread, which a lock of the file keeps out as well."""

    def enter() -> float:
        with open_entry(tmp_path, "abc", said.set):
            return time.monotonic()

    said = threading.Event()
    with ThreadPoolExecutor() as pool:
        with open_entry(tmp_path, "abc", lambda: pytest.fail("nobody is there")):
            second = pool.submit(enter)
            assert said.wait(60)
            left = time.monotonic()
        assert second.result(60) >= left


def test_as_many_trainings_are_at_work_as_there_are_places(tmp_path: Path):
    at_work, numbers = set(), []

    def work(number: int) -> None:
        with working_place(tmp_path, 2):
            at_work.add(number)
            numbers.append(len(at_work))
            time.sleep(0.5)
            at_work.remove(number)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, range(5)))
    assert max(numbers) == 2


def test_the_oldest_go_first_where_there_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "checkpoint.safetensors").write_bytes(bytes(1000))
        os.utime(tmp_path / str(number), (number, number))
    monkeypatch.setenv("TRAININGS_MAX_GB", "2.5e-6")
    with open_entry(tmp_path, "0"):  # at work
        os.utime(tmp_path / "0", (0, 0))
        prune(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "2", "3"]
    for wrong in ("many", "nan"):
        monkeypatch.setenv("TRAININGS_MAX_GB", wrong)
        with pytest.raises(UserError, match=f"TRAININGS_MAX_GB = '{wrong}'"):
            prune(tmp_path)
