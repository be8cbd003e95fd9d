"""A grid of experiments, run on Ray, and the finished ones as a table and a figure.

    python -m studies.study run mnist                  run what is missing of studies/mnist.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect mnist              write metrics/studies/mnist.csv, .md and .png from what is finished

An interrupted study resumes with the same command; after a change in settings, code or data, what they decide runs anew.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import sys
from typing import Annotated, Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from pydantic import Field, ValidationError
from tqdm import tqdm

from pipeline.core.errors import UserError, one_line
from pipeline.core.files import read_json, read_yaml, write_atomic
from pipeline.core.provenance import commit
from pipeline.params import Block, Params, load_params, shown
from pipeline.reporting.tables import difference, scale, unit
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import prune, read_record, trainings_folder
from studies.tasks import MODELS, ROOT, Task, on_ray, one_by_one, plan, result_path, train_network

MOST_POINTS = 10_000  # of a grid
VERDICTS = ("better", "worse", "equivalent", "undecided")
ALPHA = 0.05


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
    """params.yaml with one combination of a grid's settings."""

    name: str  # the same for the same settings
    grid: Grid
    settings: dict[str, Any]  # by dotted parameter: all that the study names
    params: Params


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
        else:
            run(arguments, plans, points[0].params.tracking.experiment)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        sys.exit(130)


def load_study(name: str, threads: int | None = None) -> list[Point]:
    """The points of studies/<name>.yaml, grid by grid, with these threads unless None. Raises UserError for a bad file."""
    path, params = ROOT / "studies" / f"{name}.yaml", load_params(ROOT / "params.yaml").model_dump()
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: no such study; there are: {names}")
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
    for grid in study.grids:
        if not all(isinstance(value, int | float) and value > 0 for value in grid.vary[grid.x]):
            raise UserError(f"{path}: {grid.title}: x = {grid.x!r} has values that are no positive numbers: they make no axis")
    named = list(study.fixed.items())
    for grid in study.grids:
        named += [*grid.fixed.items(), *((key, value) for key, values in grid.vary.items() for value in values)]
    spelt = ([f"{key}.{name}" for name in value] if isinstance(value, dict) else [key] for key, value in named)
    keys = dict.fromkeys(itertools.chain(*spelt))
    points = []
    for grid, point in combinations:
        settings = point.values(*keys)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        points.append(Point(f"{name}-{digest[:8]}", grid, point.flat(*keys), point))
    return points


def merge(content: Any, settings: Any) -> Any:
    """`content` with other settings, which may be mappings in mappings, dotted keys, or both."""
    if not (isinstance(content, dict) and isinstance(settings, dict)):
        return settings
    merged = dict(content)
    for key, value in settings.items():
        block, dot, rest = str(key).partition(".")
        merged[block] = merge(merged.get(block), {rest: value} if dot else value)
    return merged


def run(arguments: argparse.Namespace, plans: dict[str, list[Task]], experiment: str) -> None:
    """Do what is missing of the points' tasks, mirror trainings into MLflow's `experiment`; exit with 1 if a point failed."""
    missing = {tasks[-1].digest: name for name, tasks in plans.items() if not result_path(tasks[-1].digest).is_file()}
    tasks = list({task.digest: task for name in missing.values() for task in plans[name]}.values())
    reasons: dict[str, str] = {}
    if tasks:
        engine = one_by_one(tasks) if arguments.one_by_one else on_ray(tasks, arguments.workers, arguments.per_gpu)
        mirror = Mirror(experiment)
        for task, (result, reason) in (bar := tqdm(engine, arguments.study, len(tasks), unit="task", disable=None)):
            if reason:
                reasons[task.digest] = reason
            elif task.work is train_network and (record := read_record(trainings_folder(), result.parent.name)):
                mirror.training(record)
            if name := missing.get(task.digest):
                bar.write(f"{name}: {'failed' if reason else 'finished'}")
        prune(trainings_folder())
    failed = 0
    for name, needed in plans.items():
        if reason := next((reasons[task.digest] for task in needed if task.digest in reasons), None):
            failed += 1
            print(f"error: {name}: {reason}", file=sys.stderr)
    done = f"{len(tasks) - len(reasons)} of {len(tasks)} tasks done now"
    print(f"{arguments.study}: {len(plans)} points, {len(plans) - failed} finished; {done}")
    sys.exit(bool(failed))


def collect(name: str, points: list[Point], plans: dict[str, list[Task]]) -> None:
    """Write table and figure of the finished points."""
    finished = [(point, path) for point in points if (path := result_path(plans[point.name][-1].digest)).is_file()]
    rows = {point.name: point.settings | read_json(path) for point, path in finished}
    if not rows:
        raise UserError(f"study {name}: no finished point by this code: make study STUDY={name}")
    frame, image = pd.DataFrame(list(rows.values()), pd.Index(rows, name="experiment")), io.BytesIO()
    table = markdown(name, frame, list(points[0].settings), len(plans))
    plot(frame, points).savefig(image, format="png", dpi=110)
    csv = frame.drop(columns="seeds", errors="ignore").to_csv()
    for suffix, content in (("csv", csv), ("md", table), ("png", image.getvalue())):
        write_atomic(ROOT / "metrics" / "studies" / f"{name}.{suffix}", content)
    print(table)


def markdown(name: str, frame: pd.DataFrame, settings: list[str], planned: int) -> str:
    """The table: a row per finished point, in percent and percentage points (of nll, nats)."""
    varied = [key for key in settings if frame[key].map(str).nunique() > 1]
    fixed = ", ".join(f"{key} {frame[key].iloc[0]}" for key in settings if key not in varied)
    counts = ", ".join(f"{verdict} {sum(frame['verdict'].str.startswith(verdict))}" for verdict in VERDICTS)
    frame = (frame.sort_values(varied) if varied else frame).assign(holm=lambda rows: holm(rows["p"].astype(float)))
    metric = frame["metric"].iloc[0]
    gain = frame[["gain", "low", "high"]].astype(float).map(functools.partial(difference, metric))
    table = frame[varied].copy()
    for model in MODELS:
        heading = f"{model.removeprefix('student_')} ({'nats' if metric == 'nll' else '%'})"
        table[heading] = (scale(metric) * frame[f"{metric}_{model}"]).map("{:.2f}".format)
    table[f"gain ({unit(metric)})"], table["95 % interval"] = gain["gain"], gain["low"] + " to " + gain["high"]
    table["p, Holm"], table["distilled is"] = frame["holm"].map("{:.3f}".format), frame["verdict"]
    remain = sum(frame["holm"] < ALPHA)
    return (
        f"Study {name}: {len(frame)} of {planned} points finished, on commit `{commit()}`; {fixed}.\n\n"
        f"The distilled student against the same student alone, at 95 % each: {counts}. Corrected for there being {len(frame)} "
        f"comparisons (Holm 1979), {remain} of the differences remain at 5 %.\n\n"
        f"{table.to_markdown(index=False, tablefmt='github', disable_numparse=True)}\n\n![Gains of study {name}]({name}.png)\n"
    )


def holm(p: pd.Series) -> pd.Series:
    """Values of p corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65-70)."""
    ordered = p.sort_values()
    return (ordered * range(len(p), 0, -1)).cummax().clip(upper=1)[p.index]


def plot(frame: pd.DataFrame, points: list[Point]) -> Figure:
    """A panel per grid: the gain in percentage points with its interval over the grid's x, a line per other setting."""
    grids = [(grid, list(group)) for grid, group in itertools.groupby(points, lambda point: point.grid)]
    figure, metric = Figure(figsize=(6.5 * len(grids), 5), layout="constrained"), frame["metric"].iloc[0]
    for axes, (grid, group) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        labels = {}
        for point in (point for point in group if point.name in frame.index):
            others = {key: value for key, value in point.settings.items() if key != grid.x and _is_varied(key, grid)}
            labels[point.name] = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in others.items())
        lines = frame.loc[list(labels)].groupby(pd.Series(labels, dtype=str), sort=False)
        for number, (label, line) in enumerate(lines):
            x = line[grid.x] * 1.05 ** (number - (len(lines) - 1) / 2)  # side by side
            gain, low, high = (scale(metric) * line[key].astype(float) for key in ("gain", "low", "high"))
            style = {"marker": "osD^vPX*"[number % 8], "linestyle": ("-", "--", ":", "-.")[number % 4], "linewidth": 1}
            axes.errorbar(x, gain, [gain - low, high - gain], capsize=3, markersize=5, label=label.replace("$", r"\$"), **style)
        axes.axhline(0, color="black", linewidth=0.8)
        title = grid.title.replace("$", r"\$")  # no mathematics
        axes.set(title=title, xscale="log", xlabel=grid.x, ylabel=f"gain of distillation ({unit(metric)})")
        axes.set_xticks(grid.vary[grid.x], grid.vary[grid.x])
        axes.minorticks_off()
        if any(labels.values()):
            axes.legend(fontsize=8)
    return figure


def _is_varied(key: str, grid: Grid) -> bool:
    return any(key == varied or key.startswith(f"{varied}.") for varied in grid.vary)


if __name__ == "__main__":
    main()
