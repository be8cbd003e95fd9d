"""A grid of experiments, run on Ray, and the finished ones as a table and a figure.

    python -m studies.study run mnist                  run what is missing of studies/mnist.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect mnist              write metrics/studies/mnist.csv, .md and .png from what is finished

A point is params.yaml with settings of the study. An interrupted study resumes with the same command; after a change in settings,
code or data, what they decide runs anew.
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

import numpy as np
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
from studies.tasks import Task, on_ray, one_by_one, plan, result_path, train_network

ROOT = Path(__file__).parents[1]
MOST_POINTS = 10_000  # of a grid
HEADINGS = {"teacher": "teacher (%)", "student_alone": "alone (%)", "student_distilled": "distilled (%)"}
MARKERS, LINES = "osD^vPX*", ("-", "--", ":", "-.")


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
        """Of each of a grid's points, what is varied as the grid has it, and all settings by dotted parameter."""
        for values in itertools.product(*grid.vary.values()):
            varied = dict(zip(grid.vary, values, strict=True))
            yield varied, flat({**self.fixed, **grid.fixed, **varied})

    def settings(self, name: str) -> dict[str, dict[str, Any]]:
        """Every point's settings by the point's name; a point that two grids share counts once."""
        return {point_name(name, point): point for grid in self.grids for _, point in self.points(grid)}


def main() -> None:
    """Parse the command line and run or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect"])
    parser.add_argument("study", help="a file studies/<study>.yaml")
    parser.add_argument("--one-by-one", action="store_true", help="run in this process, without Ray")
    parser.add_argument("--threads", type=positive, help="that a task computes with (default: those of params.yaml)")
    parser.add_argument("--workers", type=positive, help="tasks at a time on this machine (default: cores / threads)")
    parser.add_argument("--per-gpu", type=positive, default=4, help="tasks that share a GPU (default 4)")
    arguments = parser.parse_args()
    try:
        study = load_study(arguments.study)
        content = read_yaml(ROOT / "params.yaml") | ({"threads": arguments.threads} if arguments.threads else {})
        points = {name: with_settings(content, point) for name, point in study.settings(arguments.study).items()}
        plans = {name: plan(params) for name, params in points.items()}
        if arguments.action == "collect":
            collect(arguments.study, study, plans)
        elif not run(arguments, plans, next(iter(points.values())).tracking.experiment):
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
    path, content = ROOT / "studies" / f"{name}.yaml", read_yaml(ROOT / "params.yaml")
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: cannot be read; the studies here: {names}")
    try:
        study = Study.model_validate(read_yaml(path))
        for grid in study.grids:
            if grid.x not in grid.vary:
                raise UserError(f"{path}: {grid.title}: x = {grid.x!r} is not varied; what is: {', '.join(grid.vary)}")
            if (points := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {points:,} points, more than {MOST_POINTS:,}")
            for _, settings in study.points(grid):
                with_settings(content, settings)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key} = {shown(problem['input'])}: {problem['msg']}") from error
    return study


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted parameter: a block (a mapping as value) becomes its single parameters."""
    blocks = [(f"{key}.", value) if isinstance(value, Mapping) else ("", {key: value}) for key, value in settings.items()]
    return {f"{prefix}{key}": value for prefix, block in blocks for key, value in block.items()}


def with_settings(content: Mapping[str, Any], settings: Mapping[str, Any]) -> Params:
    """The content of params.yaml with other settings. Raises ValidationError for what it does not allow."""
    params = copy.deepcopy(dict(content))
    for key, value in settings.items():
        *blocks, last = key.split(".")
        place = params
        for block in blocks:
            if not isinstance(place.get(block), dict):
                place[block] = {}
            place = place[block]
        place[last] = value
    return Params.model_validate(params)


def point_name(study: str, settings: Mapping[str, Any]) -> str:
    """The name of a point: the same for the same settings."""
    return f"{study}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def run(arguments: argparse.Namespace, plans: Mapping[str, list[Task]], experiment: str) -> bool:
    """Do what is missing, mirror each training that has finished, say how each point ends; whether all are finished.

    `plans` has each point's tasks by its name; `experiment` is MLflow's.
    """
    missing = {name: tasks for name, tasks in plans.items() if not result_path(ROOT, tasks[-1].digest).is_file()}
    tasks = list({task.digest: task for tasks in missing.values() for task in tasks}.values())
    reasons: dict[str, str] = {}
    if tasks:
        engine = one_by_one(ROOT, tasks) if arguments.one_by_one else on_ray(ROOT, tasks, arguments.workers, arguments.per_gpu)
        mirror = Mirror(experiment)
        for task, (result, reason) in (bar := tqdm(engine, arguments.study, len(tasks), unit="task", disable=None)):
            if reason:
                reasons[task.digest] = reason
            elif task.work is train_network and (record := read_record(result.parent.parent, result.parent.name)):
                mirror.training(record)
            for name in [name for name, tasks in missing.items() if tasks[-1].digest == task.digest]:
                bar.write(f"{name}: {'failed' if reason else 'finished'}")
        prune(ROOT / ".trainings")
    failed = {name: tasks for name, tasks in missing.items() if tasks[-1].digest in reasons}
    for name, needed in failed.items():
        print(f"error: {name}: {next(reasons[task.digest] for task in needed if task.digest in reasons)}", file=sys.stderr)
    finished, done = len(plans) - len(failed), len(tasks) - len(reasons)
    print(f"{arguments.study}: {len(plans)} points, {finished} finished; {done} of {len(tasks)} tasks done now")
    return not failed


def collect(name: str, study: Study, plans: Mapping[str, list[Task]]) -> None:
    """Write table and figure of the finished points."""
    settings = study.settings(name)
    paths = {point: path for point, tasks in plans.items() if (path := result_path(ROOT, tasks[-1].digest)).is_file()}
    if not paths:
        raise UserError(f"study {name}: no finished point by this code: make study STUDY={name}")
    rows = [settings[point] | read_json(path) for point, path in paths.items()]
    frame = pd.DataFrame(rows, index=pd.Index(paths, name="experiment"))
    varied = [key for key in next(iter(settings.values())) if frame[key].map(json.dumps).nunique() > 1]
    image, folder = io.BytesIO(), ROOT / "metrics" / "studies"
    plot(name, study, frame).savefig(image, format="png", dpi=110)
    table = markdown(name, study, frame, varied, len(settings))
    write_atomic(folder / f"{name}.csv", frame.drop(columns="seeds", errors="ignore").to_csv())
    write_atomic(folder / f"{name}.md", table)
    write_atomic(folder / f"{name}.png", image.getvalue())
    print(table)


def markdown(name: str, study: Study, frame: pd.DataFrame, varied: list[str], planned: int) -> str:
    """The table: a row per finished point, in percent and percentage points."""
    rows = frame.sort_values(varied)
    percent = 100 * rows.select_dtypes("number")
    accuracies = {heading: percent[f"accuracy_{model}"].map("{:.2f}".format) for model, heading in HEADINGS.items()}
    gains = {key: percent[key].map("{:+.2f}".format) for key in ("gain", "low", "high")}
    intervals = gains["low"] + " to " + gains["high"]
    table = {key: rows[key] for key in varied} | accuracies
    table |= {"gain (points)": gains["gain"], "95 % interval": intervals, "distilled is": rows["verdict"]}
    verdicts = ("better", "worse", "not distinguishable")
    counts = ", ".join(f"{verdict} {(rows['verdict'] == verdict).sum()}" for verdict in verdicts)
    fixed = ", ".join(f"{key} {value}" for key, value in flat(study.fixed).items())
    return (
        f"Study {name}: {len(frame)} of {planned} points finished, on commit `{commit()}`; {fixed}.\n\n"
        f"The distilled student against the same student alone, at 95 % each: {counts}. Where nothing is gained, up to one point"
        " in twenty is expected to be called better or worse by chance.\n\n"
        f"{tabulate(table, 'keys', tablefmt='github', disable_numparse=True)}\n\n![Gains of study {name}]({name}.png)\n"
    )


def plot(name: str, study: Study, frame: pd.DataFrame) -> Figure:
    """A panel per grid: the gain in percentage points with its interval over the grid's x, a line per other setting."""
    figure = Figure(figsize=(6.5 * len(study.grids), 5), layout="constrained")
    for axes, grid in zip(figure.subplots(1, len(study.grids), squeeze=False)[0], study.grids, strict=True):
        lines: dict[str, list[list[float]]] = {}
        for varied, settings in study.points(grid):
            if (point := point_name(name, settings)) in frame.index:
                label = ", ".join(f"{key.split('.')[-1]} {short(varied[key])}" for key in varied if key != grid.x)
                gain = [100 * frame.loc[point, key] for key in ("gain", "low", "high")]
                lines.setdefault(label, []).append([float(varied[grid.x]), *gain])
        for number, (label, line) in enumerate(lines.items()):
            x, gain, low, high = np.array(line).T
            x *= 1.05 ** (number - (len(lines) - 1) / 2)  # side by side
            style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)], "linewidth": 1}
            axes.errorbar(x, gain, [gain - low, high - gain], capsize=3, markersize=5, label=label, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=grid.title, xscale="log", xlabel=grid.x, ylabel="gain of distillation (percentage points)")
        ticks = sorted({float(value) for value in grid.vary[grid.x]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if any(lines):
            axes.legend(fontsize=8)
    return figure


def short(value: object) -> str:
    """A varied value for a legend: a block by its first entry."""
    return " ".join(map(str, next(iter(value.items())))) if isinstance(value, Mapping) else str(value)


if __name__ == "__main__":
    main()
