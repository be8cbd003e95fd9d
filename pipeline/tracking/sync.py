"""Bring the MLflow store up to date with the disk: the workspace, every DVC experiment, and what .trainings/ holds.

    make sync      after an outage, with others' experiments, for a new store

What DVC's cache lacks is skipped with a line: `dvc fetch` may bring it.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc_data.index import DataIndexDirError

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import parse_yaml
from pipeline.core.provenance import git
from pipeline.evaluation.comparisons import read_evaluation
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import COMMIT, DIRTY, STAGE, Mirror
from pipeline.training.cache import Record, read_record, trainings_folder

EXPERIMENT = re.compile(r"(\w+) refs/exps/(\w\w)/(\w{38})/(.+)")  # its revision, that of its baseline in two parts, its name
MISSING = (OSError, DvcException, DataIndexDirError, UserError)


class Place(NamedTuple):
    """The workspace or an experiment: its name, its files, and the tags of its runs."""

    name: str
    files: DVCFileSystem
    origin: dict[str, str]

    def read(self, path: str) -> bytes:
        """The content of a file. Raises OSError if it is not there or not in DVC's cache."""
        try:
            return self.files.cat_file(path)
        except (DvcException, DataIndexDirError) as error:
            raise OSError(error) from error


def main() -> None:
    mirror = Mirror(load_params().tracking.experiment)
    places = [Place("workspace", DVCFileSystem(), {})]
    # `dvc.api.exp_show` collects the metrics of every commit first: half a minute for a hundred.
    for revision, *baseline, name in EXPERIMENT.findall(git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")):
        origin = {COMMIT: "".join(baseline), DIRTY: "", "dvc.experiment": name}
        places.append(Place(name, DVCFileSystem(rev=revision), origin))
    keys = [path.parent.name for path in trainings_folder().glob("*/record.json")]
    records = [record for key in keys if (record := read_record(trainings_folder(), key))]
    finished = {record.checkpoint_md5: record for record in records if record.finished}
    for place in places:
        for record, stage in trainings(place, finished):
            mirror.training(record, place.origin | {STAGE: stage})
    for record in records:
        if record.finished or record.failed:
            mirror.training(record, {STAGE: ""})
    evaluations = 0
    for place in reversed(places):  # the workspace's verdicts come last, and stay
        for track in TRACKS:
            if place.files.exists(f"metrics/detail/{track}.json"):
                try:
                    mirror.evaluation(read_evaluation(track, place.read), place.origin)
                    evaluations += 1
                except UserError as error:
                    print(f"skipped: {place.name}: {one_line(error)}")
    if mirror.pending or mirror.refusals:
        raise UserError("the store lacks what is said above: run make sync again")
    print(f"in the store: {len(finished)} trainings, {evaluations} evaluations of the workspace and {len(places) - 1} experiments")


def trainings(place: Place, finished: dict[str, Record]) -> Iterator[tuple[Record, str]]:
    """The records of a place's checkpoints, with the stages that trained them. Adds to `finished`, by the checkpoints' MD5."""
    path = "dvc.lock"
    try:
        stages = parse_yaml(place.read(path))["stages"]
        outputs = {out["path"]: stage for stage, entry in stages.items() for out in entry.get("outs", ())}
    except (*MISSING, TypeError, LookupError, AttributeError) as error:
        print(f"skipped: {place.name}: {path}: {one_line(error)}")
        return
    for path, stage in outputs.items():
        try:
            for file, entry in place.files.find(path, detail=True).items():
                if re.fullmatch(r"models/.*/seed\d+\.safetensors", file):
                    yield finished.get(entry.get("md5")) or _read(place, file, finished), stage
        except MISSING as error:
            print(f"skipped: {place.name}: {path}: {one_line(error)}")


def _read(place: Place, file: str, finished: dict[str, Record]) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        place.files.get_file(file, f"{folder}/{Path(file).name}")
        record = Record.of_checkpoint(Path(folder) / Path(file).name)
    return finished.setdefault(record.checkpoint_md5, record)


if __name__ == "__main__":
    run(main)
