"""Bring the MLflow store up to date with the disk: the workspace, every DVC experiment, and what .trainings/ holds.

    make sync      after an outage, with others' experiments, for a new store

What DVC's cache lacks is skipped with a line: `dvc fetch` may bring it.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dvc.api import DVCFileSystem
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import parse_yaml
from pipeline.core.provenance import git
from pipeline.evaluation.comparisons import read_evaluation
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import COMMIT, DIRTY, EXPERIMENT, STAGE, Mirror
from pipeline.training.cache import Record, read_record, trainings_folder

REFERENCE = re.compile(r"(\w+) refs/exps/(\w\w)/(\w{38})/(.+)")  # its revision; its baseline's, in two parts; its name


class Place(NamedTuple):
    """The workspace or an experiment: its name, its files, and the tags of its runs."""

    name: str
    files: AbstractFileSystem
    origin: dict[str, str]

    @contextlib.contextmanager
    def skipping(self, path: str) -> Iterator[None]:
        """Say that a file is missing or damaged, and go on."""
        try:
            yield
        except Exception as error:  # the file systems of DVC's remotes raise their own
            print(f"skipped: {self.name}: {path}: {one_line(error)}")

    def trainings(self, finished: dict[str, Record]) -> Iterator[tuple[Record, str]]:
        """The records of the checkpoints, and the stages that trained them. Adds to `finished`, by the checkpoints' MD5."""
        outputs = {}
        with self.skipping("dvc.lock"):
            stages = parse_yaml(self.files.cat_file("dvc.lock"))["stages"]
            outputs = {out["path"]: stage for stage, entry in stages.items() for out in entry.get("outs", ())}
        for path, stage in outputs.items():
            files = {}
            with self.skipping(path):
                files = self.files.find(path, detail=True)
            for file in filter(re.compile(r"models/.*/seed\d+\.safetensors").fullmatch, files):
                with self.skipping(file):
                    yield finished.get(files[file].get("md5")) or self._read(file, finished), stage

    def _read(self, file: str, finished: dict[str, Record]) -> Record:
        with tempfile.TemporaryDirectory() as folder:
            self.files.get_file(file, f"{folder}/{Path(file).name}")
            record = Record.of_checkpoint(Path(folder) / Path(file).name)
        return finished.setdefault(record.checkpoint_md5, record)


def main() -> None:
    """Mirror trainings, then evaluations: the workspace's last, so that its verdicts stay."""
    mirror = Mirror(load_params().tracking.experiment)
    places = [Place("workspace", DirFileSystem(str(Path.cwd()), target_protocol="file"), {})]
    # dvc.api.exp_show would collect the metrics of every commit first: half a minute for a hundred.
    references = git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    for revision, *baseline, name in REFERENCE.findall(references):
        origin = {COMMIT: "".join(baseline), DIRTY: "", EXPERIMENT: name}
        places.append(Place(name, DVCFileSystem(rev=revision), origin))
    keys = [path.parent.name for path in trainings_folder().glob("*/record.json")]
    records = [record for key in keys if (record := read_record(trainings_folder(), key))]
    finished = {record.checkpoint_md5: record for record in records if record.finished}
    for place in places:
        for record, stage in place.trainings(finished):
            mirror.training(record, place.origin | {STAGE: stage})
    for record in records:
        if record.finished or record.failed:
            mirror.training(record, {STAGE: ""})
    for place in reversed(places):
        for track in TRACKS:
            if place.files.exists(f"metrics/detail/{track}.json"):
                with place.skipping(f"evaluation of {track}"):
                    mirror.evaluation(read_evaluation(track, place.files.cat_file), place.origin)
    if mirror.pending or mirror.refusals:
        raise UserError("the store lacks what is said above: run make sync again")
    print(f"in the store: {len(finished)} trainings of the workspace, {len(places) - 1} experiments and .trainings/")


if __name__ == "__main__":
    run(main)
