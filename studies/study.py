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
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, ValidationError
from tabulate import tabulate
from tqdm import tqdm

from pipeline.core.errors import UserError, one_line
from pipeline.core.files import read_json, read_yaml, write_atomic
from pipeline.core.provenance import commit
from pipeline.params import Block, Params, load_params, shown
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import prune, read_record, trainings_folder
from studies.tasks import MODELS, ROOT, Task, on_ray, one_by_one, plan, result_path, train_network

MOST_POINTS = 10_000  # of a grid
MARKERS, LINES = "osD^vPX*", ("-", "--", ":", "-.")


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
    parser.add_argument("--threads", type=int, help="that a task computes with (default: those of params.yaml)")
    parser.add_argument("--workers", type=int, help="tasks at a time on this machine (default: cores / threads)")
    parser.add_argument("--per-gpu", type=int, default=4, help="tasks that share a GPU (default 4)")
    arguments = parser.parse_args()
    if any(number is not None and number < 1 for number in (arguments.threads, arguments.workers, arguments.per_gpu)):
        parser.error("--threads, --workers and --per-gpu are at least 1")
    try:
        study, points = load_study(arguments.study, arguments.threads)
        plans = {name: plan(params) for name, params in points.items()}
        if arguments.action == "collect":
            collect(arguments.study, study, plans)
        elif not run(arguments, plans, next(iter(points.values())).tracking.experiment):
            sys.exit(1)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def load_study(name: str, threads: int | None = None) -> tuple[Study, dict[str, Params]]:
    """The study of studies/<name>.yaml, and by its points' names their parameters, with these threads unless None.

    Raises UserError for a missing or malformed file and for settings that params.yaml does not allow.
    """
    path = ROOT / "studies" / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: cannot be read; the studies here: {names}")
    params, points = load_params(ROOT / "params.yaml"), {}
    try:
        study = Study.model_validate(read_yaml(path))
        for grid in study.grids:
            if grid.x not in grid.vary:
                raise UserError(f"{path}: {grid.title}: x = {grid.x!r} is not varied; what is: {', '.join(grid.vary)}")
            if (count := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {count:,} points, more than {MOST_POINTS:,}")
            for _, settings in study.points(grid):
                point = with_settings(params, settings | ({"threads": threads} if threads else {}))
                points[point_name(name, settings)] = point
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key} = {shown(problem['input'])}: {problem['msg']}") from error
    return study, points


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted parameter: a block (a mapping as value) becomes its single parameters."""
    blocks = [(f"{key}.", value) if isinstance(value, Mapping) else ("", {key: value}) for key, value in settings.items()]
    return {f"{prefix}{key}": value for prefix, block in blocks for key, value in block.items()}


def with_settings(params: Params, settings: Mapping[str, Any]) -> Params:
    """`params` with other settings, by dotted parameter. Raises ValidationError for what params.yaml does not allow."""
    content = params.model_dump()
    for key, value in settings.items():
        *blocks, last = key.split(".")
        place = content
        for block in blocks:
            if not isinstance(place.get(block), dict):
                place[block] = {}
            place = place[block]
        place[last] = value
    return Params.model_validate(content)


def point_name(study: str, settings: Mapping[str, Any]) -> str:
    """The name of a point: the same for the same settings."""
    return f"{study}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def run(arguments: argparse.Namespace, plans: Mapping[str, list[Task]], experiment: str) -> bool:
    """Do what is missing, mirror each training that has finished, say how each point ends; whether all are finished.

    `plans` has each point's tasks by its name; `experiment` is MLflow's.
    """
    missing = {name: tasks for name, tasks in plans.items() if not result_path(tasks[-1].digest).is_file()}
    tasks = list({task.digest: task for tasks in missing.values() for task in tasks}.values())
    reasons: dict[str, str] = {}
    if tasks:
        engine = one_by_one(tasks) if arguments.one_by_one else on_ray(tasks, arguments.workers, arguments.per_gpu)
        mirror = Mirror(experiment)
        for task, (result, reason) in (bar := tqdm(engine, arguments.study, len(tasks), unit="task", disable=None)):
            if reason:
                reasons[task.digest] = reason
            elif task.work is train_network and (record := read_record(trainings_folder(), result.parent.name)):
                mirror.training(record)
            for name in [name for name, tasks in missing.items() if tasks[-1].digest == task.digest]:
                bar.write(f"{name}: {'failed' if reason else 'finished'}")
        prune(trainings_folder())
    failed = {name: tasks for name, tasks in missing.items() if tasks[-1].digest in reasons}
    for name, needed in failed.items():
        print(f"error: {name}: {next(reasons[task.digest] for task in needed if task.digest in reasons)}", file=sys.stderr)
    finished, done = len(plans) - len(failed), len(tasks) - len(reasons)
    print(f"{arguments.study}: {len(plans)} points, {finished} finished; {done} of {len(tasks)} tasks done now")
    return not failed


def collect(name: str, study: Study, plans: Mapping[str, list[Task]]) -> None:
    """Write table and figure of the finished points."""
    settings = study.settings(name)
    paths = {point: path for point, tasks in plans.items() if (path := result_path(tasks[-1].digest)).is_file()}
    if not paths:
        raise UserError(f"study {name}: no finished point by this code: make study STUDY={name}")
    rows = [settings[point] | read_json(path) for point, path in paths.items()]
    frame = pd.DataFrame(rows, index=pd.Index(paths, name="experiment"))
    varied = [key for key in frame if key in next(iter(settings.values())) and frame[key].map(json.dumps).nunique() > 1]
    table, image = markdown(name, study, frame, varied, len(settings)), io.BytesIO()
    plot(name, study, frame).savefig(image, format="png", dpi=110)
    csv = frame.drop(columns="seeds", errors="ignore").to_csv()
    for suffix, content in (("csv", csv), ("md", table), ("png", image.getvalue())):
        write_atomic(ROOT / "metrics" / "studies" / f"{name}.{suffix}", content)
    print(table)


def markdown(name: str, study: Study, frame: pd.DataFrame, varied: list[str], planned: int) -> str:
    """The table: a row per finished point, in percent and percentage points."""
    rows = frame.sort_values(varied)
    percent = 100 * rows.select_dtypes("number")
    table = {key: rows[key] for key in varied}
    table |= {f"{m.removeprefix('student_')} (%)": percent[f"accuracy_{m}"].map("{:.2f}".format) for m in MODELS}
    gain, low, high = (percent[key].map("{:+.2f}".format) for key in ("gain", "low", "high"))
    table |= {"gain (points)": gain, "95 % interval": low + " to " + high, "distilled is": rows["verdict"]}
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
                others = flat({key: value for key, value in varied.items() if key != grid.x})
                label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in others.items())
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


if __name__ == "__main__":
    main()
