"""A grid of experiments, run on Ray, and the finished ones as a table and a figure.

    python -m studies.study run mnist                  run what is missing of studies/mnist.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect mnist              write metrics/studies/mnist.csv, .md and .png from what is finished

A point is params.yaml with settings of the study. An interrupted study resumes with the same command; after a change in settings,
code or data, what they decide runs anew.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pandas as pd
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from pydantic import Field, ValidationError
from tqdm import tqdm

from pipeline.core.errors import UserError, one_line
from pipeline.core.files import read_json, read_yaml, write_atomic
from pipeline.core.provenance import commit
from pipeline.params import Block, Params, load_params, shown
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import prune, read_record, trainings_folder
from studies.tasks import MODELS, ROOT, Task, on_ray, one_by_one, plan, result_path, train_network

MOST_POINTS = 10_000  # of a grid
STYLES = {"color": list(TABLEAU_COLORS)[:8], "marker": list("osD^vPX*"), "linestyle": ["-", "--", ":", "-."] * 2}


class Grid(Block):
    """All combinations of `vary` with `fixed`; a key is a parameter, or a block whose values are mappings."""

    title: str
    x: str  # the varied key that the figure has on its horizontal axis
    fixed: dict[str, Any] = Field({})
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]]


class Study(Block):
    """A study file."""

    fixed: dict[str, Any] = Field({})
    grids: Annotated[list[Grid], Field(min_length=1)]


class Point(NamedTuple):
    """One combination of a grid."""

    name: str  # the same for the same settings
    grid: Grid
    params: Params
    settings: dict[str, Any]  # by dotted parameter: all that the study names


def main() -> None:
    """Parse the command line and run or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect"])
    parser.add_argument("study", help="a file studies/<study>.yaml")
    parser.add_argument("--one-by-one", action="store_true", help="run in this process, without Ray")
    parser.add_argument("--threads", type=int, help="that a task computes with (default: those of params.yaml)")
    parser.add_argument("--workers", type=int, help="tasks at a time on this machine (default: cores / threads)")
    parser.add_argument("--per-gpu", type=int, default=4, help="tasks that share a GPU (default 4)")
    arguments = parser.parse_args()
    if any(number is not None and number < 1 for number in (arguments.threads, arguments.workers, arguments.per_gpu)):
        parser.error("--threads, --workers and --per-gpu are at least 1")
    try:
        points = load_study(arguments.study, arguments.threads)
        plans = {point.name: plan(point.params) for point in points}
        if arguments.action == "collect":
            collect(arguments.study, points, plans)
        elif not run(arguments, plans, points[0].params.tracking.experiment):
            sys.exit(1)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def load_study(name: str, threads: int | None = None) -> list[Point]:
    """The points of studies/<name>.yaml, grid by grid, with these threads unless None; a point may be in two grids.

    Raises UserError for a missing or malformed file and for settings that params.yaml does not allow.
    """
    path, params = ROOT / "studies" / f"{name}.yaml", load_params(ROOT / "params.yaml").model_dump()
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: cannot be read; the studies here: {names}")
    combinations, last = [], {"threads": threads} if threads else {}
    try:
        study = Study.model_validate(read_yaml(path))
        for grid in study.grids:
            if grid.x not in grid.vary:
                raise UserError(f"{path}: {grid.title}: x = {grid.x!r} is not varied; what is: {', '.join(grid.vary)}")
            if (count := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {count:,} points, more than {MOST_POINTS:,}")
            for values in itertools.product(*grid.vary.values()):
                settings = [study.fixed, grid.fixed, dict(zip(grid.vary, values, strict=True)), last]
                combinations.append((grid, Params.model_validate(functools.reduce(merge, settings, params))))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key} = {shown(problem['input'])}: {problem['msg']}") from error
    keys = itertools.chain(study.fixed, *((*grid.fixed, *grid.vary) for grid in study.grids))
    ...
