"""A grid of experiments, run on Ray, and the finished ones as a table and a figure.

    python -m studies.study run mnist                  run what is missing of studies/mnist.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect mnist              write metrics/studies/mnist.csv, .md and .png from what is finished

A point is an experiment named after the study and its settings. Its trainings and evaluation are tasks (studies/tasks.py), known
by settings, code and data: a study that was interrupted goes on with the same command, and a changed stage runs anew.
"""

import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import time
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
from pipeline.core.files import read_json, write_atomic
from pipeline.params import Params, read_yaml, shown
from studies.engines import on_ray, one_by_one
from studies.tasks import Task, begun, environment, in_order, is_done, plan, workspace

ROOT = Path(__file__).parents[1]
METRICS = "metrics/distillation.json"
COMPARISONS = "metrics/distillation_comparisons.json"
COMPARISON = "student_distilled_vs_student_alone"
MOST_POINTS = 10_000  # of a grid
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":", "-.")


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

    target: str  # the DVC stage to reproduce
    fixed: dict[str, Any] = {}
    grids: list[Grid]

    def points(self, grid: Grid) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Of each of a grid's points, what is varied as the grid says it, and all settings by dotted parameter."""
        for values in itertools.product(*grid.vary.values()):
            chosen = dict(zip(grid.vary, values, strict=True))
            yield chosen, flat({**self.fixed, **grid.fixed, **chosen})


def main() -> None:
    """Parse the command line and run or collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect"])
    parser.add_argument("study", help="a file studies/<study>.yaml")
    parser.add_argument("--one-by-one", action="store_true", help="run in this process, without Ray")
    parser.add_argument("--threads", type=at_least_one, default=1, help="that a task computes with (default 1)")
    parser.add_argument(
        "--workers", type=at_least_one, help="tasks at a time on this machine (default: cores / threads)"
    )
    parser.add_argument("--per-gpu", type=at_least_one, default=4, help="trainings that share a GPU (default 4)")
    arguments = parser.parse_args()
    try:
        study = load_study(arguments.study)
        planned = plan(ROOT, contents(arguments.study, study), study.target, arguments.threads)
        if arguments.action == "collect":
            collect(arguments.study, study, planned)
        elif not run(arguments, planned):
            sys.exit(1)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def at_least_one(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def load_study(name: str) -> Study:
    """Read studies/<name>.yaml. Raises UserError for a missing or malformed file and for settings that params.yaml refuses."""
    path = ROOT / "studies" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: cannot be read; the studies here: {known}")
    params = read_yaml(ROOT / "params.yaml")
    try:
        study = Study.model_validate(read_yaml(path))
        for grid in study.grids:
            if grid.x not in grid.vary:
                raise UserError(f"{path}: {grid.title}: x = {grid.x!r} is not varied; what is: {', '.join(grid.vary)}")
            if (points := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {points:,} points, more than {MOST_POINTS:,}")
            for _, point in study.points(grid):
                if (one := Params.model_validate(applied(copy.deepcopy(params), point))).processes > 1:
                    raise UserError(f"{path}: processes = {one.processes}: a study's tasks are of one process each")
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, problem['loc']))} = {shown(problem['input'])}: {problem['msg']}"
        ) from error
    return study


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of blocks (a mapping as value) spelt out to single parameters."""
    found = {}
    for key, value in settings.items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def applied(params: dict[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """`params`, the content of params.yaml, with the settings of `point` in place."""
    for key, value in point.items():
        *blocks, last = key.split(".")
        place = params
        for block in blocks:
            place = place.setdefault(block, {})
            if not isinstance(place, dict):
                raise UserError(f"{key}: {block} is no block of params.yaml")
        place[last] = value
    return params


def name_of(study: str, point: Mapping[str, Any]) -> str:
    """The DVC experiment of a point: the same for the same settings."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()
    return f"{study}-{digest[:8]}"


def all_points(name: str, study: Study) -> dict[str, dict[str, Any]]:
    """Every point by its experiment's name; one that two grids share counts once."""
    return {name_of(name, point): point for grid in study.grids for _, point in study.points(grid)}


def contents(name: str, study: Study) -> dict[str, dict[str, Any]]:
    """What each point has in params.yaml, by its experiment's name."""
    params = read_yaml(ROOT / "params.yaml")
    return {one: applied(copy.deepcopy(params), point) for one, point in all_points(name, study).items()}


def run(arguments: argparse.Namespace, planned: Mapping[str, list[Task]]) -> bool:
    """Run the tasks that are not done, and say when a point is; whether all points are. `planned` as tasks.plan gives it."""
    tasks = in_order([task for targets in planned.values() for task in targets])
    missing = [task for task in tasks if not is_done(ROOT, task)]
    variables = environment(ROOT, command("git", "rev-parse", "HEAD").strip())
    threads = arguments.threads
    workers = arguments.workers or max(1, (os.cpu_count() or 1) // threads)
    if arguments.one_by_one or not missing:
        engine = one_by_one(ROOT, missing, variables)
    else:
        engine = on_ray(ROOT, missing, variables, workers, threads, arguments.per_gpu)
    left = {task.digest: task for task in missing}
    digests = {one: {task.digest for task in targets} for one, targets in planned.items()}
    open_points = {one: targets for one, targets in digests.items() if targets & left.keys()}
    failed: dict[str, str] = {}
    start = time.time()
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc=arguments.study, unit="task", disable=None
    ) as bar:
        for ended in engine:
            for digest, reason in ended.items():
                del left[digest]
                failed |= {digest: reason} if reason else {}
            bar.update(len(ended))
            trainings = sum(task.seed is not None and begun(ROOT, task) >= start for task in left.values())
            bar.set_postfix_str(f"{trainings} trainings running" if trainings else "")
            for one in [one for one, targets in open_points.items() if not targets & left.keys()]:
                bar.write(f"{one}: {'failed' if open_points.pop(one) & failed.keys() else 'finished'}")
    reasons = {
        one: next((failed[task.digest] for task in targets if task.digest in failed), None)
        for one, targets in planned.items()
    }
    unfinished = {one: reason for one, reason in reasons.items() if reason}
    for one, reason in unfinished.items():
        print(f"error: {one}: {reason}", file=sys.stderr)
    finished, done = len(planned) - len(unfinished), len(missing) - len(failed)
    print(f"{arguments.study}: {len(planned)} points, {finished} finished; {done} of {len(missing)} tasks done now")
    return not unfinished


def command(*words: str) -> str:
    """Run a command in the checkout; its output. Raises UserError with its complaint if it fails."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 (git)
    if done.returncode:
        raise UserError(f"{' '.join(words[:3])} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def collect(name: str, study: Study, planned: Mapping[str, list[Task]]) -> None:
    """Write table and figure of the finished points; `planned` as tasks.plan gives it."""
    points = all_points(name, study)
    results = {one: result for one, targets in planned.items() if (result := read_result(targets))}
    if not results:
        raise UserError(f"study {name}: no finished experiment by this code: make study STUDY={name}")
    frame = pd.DataFrame(
        [points[one] | result for one, result in results.items()], index=pd.Index(results, name="experiment")
    )
    folder = ROOT / "metrics" / "studies"
    varied = [key for key in frame if key in next(iter(points.values())) and frame[key].map(json.dumps).nunique() > 1]
    write_atomic(folder / f"{name}.csv", frame.drop(columns="seeds", errors="ignore").to_csv())
    write_atomic(folder / f"{name}.md", markdown(name, study, frame, varied, len(points)))
    picture = io.BytesIO()
    plot(name, study, frame).savefig(picture, dpi=110)
    write_atomic(folder / f"{name}.png", picture.getvalue())
    print((folder / f"{name}.md").read_text())


def read_result(targets: list[Task]) -> dict[str, Any] | None:
    """Accuracies (shares of 1) of the three models and the gain with its interval and verdict; None for an unfinished point."""
    evaluation = next((task for task in in_order(targets) if METRICS in task.stage.outs), None)
    if evaluation is None:
        raise UserError(f"{targets[0]} does not need {METRICS}, of which the table is made")
    if not is_done(ROOT, evaluation):
        return None
    folder = workspace(ROOT, evaluation)
    metrics, gain = read_json(folder / METRICS), read_json(folder / COMPARISONS)[COMPARISON]
    accuracy = {
        f"accuracy_{model}": metrics[model]["accuracy"] for model in ("teacher", "student_alone", "student_distilled")
    }
    return accuracy | {key: gain[key] for key in ("gain", "low", "high", "detectable", "verdict")}


def markdown(name: str, study: Study, frame: pd.DataFrame, varied: list[str], planned: int) -> str:
    """The table: a row per finished point, in percent and percentage points."""
    counts = frame["verdict"].value_counts()
    said = ", ".join(f"{verdict} {counts.get(verdict, 0)}" for verdict in ("better", "worse", "not distinguishable"))
    fixed = ", ".join(f"{key} {value}" for key, value in flat(study.fixed).items())
    rows = [
        [
            *(row[key] for key in varied),
            *(f"{100 * row[f'accuracy_{model}']:.2f}" for model in ("teacher", "student_alone", "student_distilled")),
            f"{100 * row['gain']:+.2f}",
            f"{100 * row['low']:+.2f} to {100 * row['high']:+.2f}",
            row["verdict"],
        ]
        for _, row in frame.sort_values(varied).iterrows()
    ]
    headings = [*varied, "teacher (%)", "alone (%)", "distilled (%)", "gain (points)", "95 % interval", "distilled is"]
    commit = command("git", "rev-parse", "HEAD").strip()
    return (
        f"Study {name}: {len(frame)} of {planned} points finished, on commit `{commit}`; {fixed}.\n\n"
        f"The distilled student against the same student alone, at 95 % each: {said}. Where nothing is gained, up to one point in"
        " twenty is expected to be called better or worse by chance.\n\n"
        f"{tabulate(rows, headings, tablefmt='github', disable_numparse=True)}\n\n![Gains of study {name}]({name}.png)\n"
    )


def plot(name: str, study: Study, frame: pd.DataFrame) -> Figure:
    """A panel per grid: the gain in percentage points with its interval over the grid's x, a line per other setting."""
    figure = Figure(figsize=(6.5 * len(study.grids), 5), layout="constrained")
    panels = figure.subplots(1, len(study.grids), squeeze=False)[0]
    for axes, grid in zip(panels, study.grids, strict=True):
        lines: dict[str, list[tuple[float, pd.Series]]] = {}
        for chosen, point in study.points(grid):
            one = name_of(name, point)
            if one in frame.index:
                label = ", ".join(
                    f"{key.split('.')[-1]} {short(value)}" for key, value in chosen.items() if key != grid.x
                )
                lines.setdefault(label, []).append((float(chosen[grid.x]), frame.loc[one]))
        for number, (label, line) in enumerate(lines.items()):
            xs = np.array([x for x, _ in line]) * 1.05 ** (number - (len(lines) - 1) / 2)  # side by side
            gain = np.array([100 * row["gain"] for _, row in line])
            ends = [gain - [100 * row["low"] for _, row in line], [100 * row["high"] for _, row in line] - gain]
            style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)]}
            axes.errorbar(xs, gain, yerr=ends, capsize=3, markersize=5, linewidth=1, label=label, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=grid.title, xscale="log", xlabel=grid.x, ylabel="gain of distillation (percentage points)")
        ticks = sorted({float(value) for value in grid.vary[grid.x]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if any(lines):
            axes.legend(fontsize=8)
    return figure


def short(value: Any) -> str:
    """A varied value for a legend: a block by its first entry."""
    return (
        ", ".join(f"{key} {one}" for key, one in list(value.items())[:1]) if isinstance(value, Mapping) else str(value)
    )


if __name__ == "__main__":
    main()
