"""Bring the MLflow store up to date with the disk: the workspace, every DVC experiment, and what .trainings/ holds.

    make sync      after an outage, with others' experiments, for a new store

What DVC's cache lacks is skipped with a line: `dvc fetch` may bring it.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dvc.api import DVCFileSystem
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line
from pipeline.core.files import parse_yaml
from pipeline.core.provenance import experiments
from pipeline.evaluation.comparisons import read_evaluation
from pipeline.params import TRACKS, load_params
from pipeline.tracking.mirror import COMMIT, DIRTY, EXPERIMENT, STAGE, Mirror
from pipeline.training.cache import Record, read_record, trainings_folder

CHECKPOINTS = re.compile(r"models/.*/seed\d+\.safetensors")


def main() -> None:
    """Mirror trainings, then evaluations: the workspace's last, so that its verdicts stay."""
    mirror = Mirror(load_params().tracking.experiment)
    places = [(DirFileSystem(str(Path.cwd()), target_protocol="file"), {})]  # files, and the tags of their runs
    # dvc.api.exp_show would collect the metrics of every commit first: half a minute for a hundred.
    for revision, baseline, name in experiments():
        places.append((DVCFileSystem(rev=revision), {COMMIT: baseline, DIRTY: "", EXPERIMENT: name}))
    keys = [path.parent.name for path in trainings_folder().glob("*/record.json")]
    records = [record for key in keys if (record := read_record(trainings_folder(), key))]
    finished = {record.checkpoint_md5: record for record in records if record.finished}
    for files, origin in places:
        with skipping(origin, "dvc.lock"):
            mirror_checkpoints(mirror, files, origin, finished)
    for record in records:
        if record.finished or record.failed:
            mirror.training(record, {STAGE: ""})
    for files, origin in reversed(places):
        for track in TRACKS:
            if files.exists(f"metrics/detail/{track}.json"):
                with skipping(origin, f"evaluation of {track}"):
                    mirror.evaluation(read_evaluation(track, files.cat_file), origin)
    if mirror.pending or mirror.refusals:
        raise UserError("the store lacks what is said above: run make sync again")
    print(f"in the store: {len(finished)} trainings of the workspace, {len(places) - 1} experiments and .trainings/")


def mirror_checkpoints(mirror: Mirror, files: AbstractFileSystem, origin: dict[str, str], finished: dict[str, Record]) -> None:
    """Mirror the trainings of dvc.lock's checkpoints; `finished` holds records by their MD5 and gets those read here."""
    stages = parse_yaml(files.cat_file("dvc.lock"))["stages"]
    for stage, output in [(stage, out["path"]) for stage, entry in stages.items() for out in entry.get("outs", ())]:
        with skipping(origin, output):
            details = files.find(output, detail=True)
            for path in filter(CHECKPOINTS.fullmatch, details):
                with skipping(origin, path), tempfile.TemporaryDirectory() as folder:
                    record = finished.get(details[path].get("md5"))
                    if record is None:
                        files.get_file(path, copy := f"{folder}/{Path(path).name}")
                        record = Record.of_checkpoint(Path(copy))
                        finished[record.checkpoint_md5] = record
                    mirror.training(record, origin | {STAGE: stage})


@contextlib.contextmanager
def skipping(origin: dict[str, str], path: str) -> Iterator[None]:
    """Say that a file of the workspace or an experiment is missing or damaged, and go on."""
    try:
        yield
    except Exception as error:  # the file systems of DVC's remotes raise their own
        print(f"skipped: {origin.get(EXPERIMENT, 'workspace')}: {path}: {one_line(error)}")


if __name__ == "__main__":
    run(main)
