"""A grid of experiments, run on Ray, and the finished ones as a table and a figure.

    python -m studies.study run mnist                  run what is missing of studies/mnist.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect mnist              write metrics/studies/mnist.csv, .md and .png from what is finished

A point is params.yaml with the settings of the study. An interrupted study resumes with the same command; what code, data or
settings have changed runs anew.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, ValidationError
from tabulate import tabulate
from tqdm import tqdm

from pipeline.core.errors import UserError
from pipeline.core.files import read_json, read_yaml, write_atomic
from pipeline.core.provenance import commit
from pipeline.params import Params, shown
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import prune, read_record
from studies.tasks import MODELS, Task, in_order, on_ray, one_by_one, plan, result_path, train_network

ROOT = Path(__file__).parents[1]
MOST_POINTS = 10_000  # of a grid
VERDICTS = ("better", "worse", "not distinguishable")
STYLES = [f"{marker}{line}" for line in ("-", "--", ":", "-.") for marker in "osD^vPX*"]


class Grid(BaseModel):
    """All combinations of `vary` with `fixed`; a key is a parameter, or a block whose values are mappings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    x: str  # the varied key that the figure has on its horizontal axis
    fixed: dict[str, Any] = {}
    vary: dict[str, list[Any]]


class Study(BaseModel):
    """A study file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fixed: dict[str, Any] = {}
    grids: list[Grid]

    def points(self, grid: Grid) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Of each of a grid's points, the varied settings as the grid has them, and all settings by dotted parameter."""
        for values in itertools.product(*grid.vary.values()):
            varied = dict(zip(grid.vary, values, strict=True))
            yield varied, flat({**self.fixed, **grid.fixed, **varied})

    def settings(self, name: str) -> dict[str, dict[str, Any]]:
        """Every point's settings by its name; a point that two grids share counts once."""
        return {point_name(name, point): point for grid in self.grids for _, point in self.points(grid)}


def main() -> None:
    """Parse the command line and run or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect"])
    parser.add_argument("study", help="a file studies/<study>.yaml")
    parser.add_argument("--one-by-one", action="store_true", help="run in this process, without Ray")
    parser.add_argument("--threads", type=positive, help="that a task computes with (default: as params.yaml says)")
    parser.add_argument("--workers", type=positive, help="tasks at a time on this machine (default: cores / threads)")
    parser.add_argument("--per-gpu", type=positive, default=4, help="tasks that share a GPU (default 4)")
    arguments = parser.parse_args()
    try:
        study = load_study(arguments.study)
        content = read_yaml(ROOT / "params.yaml") | ({"threads": arguments.threads} if arguments.threads else {})
        settings = study.settings(arguments.study)
        evaluations = plan({point: with_settings(content, chosen) for point, chosen in settings.items()})
        if arguments.action == "collect":
            collect(arguments.study, study, evaluations)
        elif not run(arguments, evaluations):
            sys.exit(1)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def load_study(name: str) -> Study:
    """Read studies/<name>.yaml. Raises UserError for a missing or malformed file and for settings that params.yaml refuses."""
    path = ROOT / "studies" / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: cannot be read; the studies here: {names}")
    content = read_yaml(ROOT / "params.yaml")
    try:
        study = Study.model_validate(read_yaml(path))
        for grid in study.grids:
            if grid.x not in grid.vary:
                raise UserError(f"{path}: {grid.title}: x = {grid.x!r} is not varied; allowed: {', '.join(grid.vary)}")
            if (points := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {points:,} points, more than {MOST_POINTS:,}")
            for _, point in study.points(grid):
                with_settings(content, point)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {place} = {shown(problem['input'])}: {problem['msg']}") from error
    return study


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted parameter: those of a block (a mapping as value) one by one."""
    single = {}
    for key, value in settings.items():
        entries = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else {key: value}
        single |= entries
    return single


def with_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> Params:
    """The content of params.yaml with other settings in place. Raises UserError or ValidationError if it does not allow them."""
    params = copy.deepcopy(dict(content))
    for key, value in settings.items():
        *blocks, last = key.split(".")
        place = params
        for block in blocks:
            place = place.setdefault(block, {})
            if not isinstance(place, dict):
                raise UserError(f"{key}: {block} is no block of params.yaml")
        place[last] = value
    return Params.model_validate(params)


def point_name(study: str, settings: Mapping[str, Any]) -> str:
    """The name of a point: the same for the same settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{study}-{digest[:8]}"


def run(arguments: argparse.Namespace, evaluations: Mapping[str, Task]) -> bool:
    """Do what is missing and say how each point ended; whether all are finished. `evaluations` as from tasks.plan."""
    missing = {point: task for point, task in evaluations.items() if not result_path(ROOT, task.digest).is_file()}
    tasks = in_order(list(missing.values()))
    ended = []
    if tasks:
        engine = one_by_one(ROOT, tasks) if arguments.one_by_one else on_ray(ROOT, tasks, arguments.workers, arguments.per_gpu)
        mirror = Mirror(tasks[0].params.tracking.experiment)
    trainings, reasons = ROOT / ".trainings", {}
    with tqdm(total=len(tasks), desc=arguments.study, unit="task", disable=None) as bar:
        for task, (result, reason) in engine if tasks else ():
            bar.update()
            if reason:
                reasons[task.digest] = reason
            elif task.work is train_network:
                mirror.training(read_record(trainings, result.parent.name))
            for point in [point for point, evaluation in missing.items() if evaluation.digest == task.digest]:
                ...
    return True
