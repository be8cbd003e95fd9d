"""Grids of experiments and what is claimed of them beforehand, run on Ray; the finished ones as tables and a figure.

    python -m studies.study run medical                run what is missing of studies/medical.yaml on this machine's cores
    RAY_ADDRESS=... python -m studies.study run mnist  the same on a cluster, whose machines share this folder
    python -m studies.study run mnist --one-by-one     the same in this process, without Ray
    python -m studies.study collect medical            write metrics/studies/medical.md, .csv, _seeds.csv, .png: what is finished

An interrupted study resumes with the same command; after a change in settings, code or data, what they decide runs anew.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator
from tqdm import tqdm

from pipeline.core import cli
from pipeline.core.errors import UserError
from pipeline.core.files import read_yaml
from pipeline.params import Block, Params, load_params, shown
from pipeline.tracking.mirror import Mirror
from pipeline.training.cache import prune, read_record, trainings_folder
from studies.contrasts import METRICS, Question, Row, Section, find
from studies.pages import write_pages
from studies.tasks import MODELS, ROOT, Task, on_ray, one_by_one, plan, result_path, train_network

MOST_POINTS = 10_000  # of a grid
Settings = dict[str, Any]  # by parameter, dotted or not; or by a block, whose values are mappings


class Grid(Block):
    """All combinations of `vary` with `fixed`."""

    title: str
    x: str | None = None  # the varied key that the figure has on its horizontal axis; None: a row per point
    fixed: Settings = Field({})
    vary: dict[str, Annotated[list[Any] | dict[str, Settings], Field(min_length=1)]]  # values of a key; or settings by a name,
    # or names that the study's `named` has settings for
    reference: Settings = Field({})  # of what is varied: the other points' distilled students are compared with that point's


class Contrast(Block):
    """A claim: `model` at a point against `other`, there or at another point, paired by seed and image."""

    title: str
    at: Settings  # what picks one point: parameters, names of settings, `grid: <title>`
    model: Literal[MODELS]
    other: Literal[MODELS]
    other_at: Settings | None = None  # None: as `at`
    minus_at: Settings | None = None  # the same difference at that point is subtracted
    metric: Literal[METRICS] | None = None  # None: the point's evaluation.primary
    split: Literal["test", "val"] = "test"
    claim: Literal["better", "equivalent", "not_inferior", "better_or_equivalent"] = "better"
    margin: Annotated[float, Field(ge=0, le=1)] | None = None  # None: the point's evaluation.margin


class Study(Block):
    """A study file."""

    fixed: Settings = Field({})
    named: dict[str, dict[str, Settings]] = Field({})
    grids: Annotated[list[Grid], Field(min_length=1)]
    contrasts: list[Contrast] = Field([])  # tested in this order, until the first that does not hold
    secondary: list[Contrast] = Field([])  # corrected, with all other comparisons, for their number

    @field_validator("secondary")
    @classmethod
    def _are_single(cls, contrasts: list[Contrast]) -> list[Contrast]:
        if any(contrast.claim == "better_or_equivalent" for contrast in contrasts):
            raise ValueError("better_or_equivalent is two claims, for `contrasts`: here, list each by itself")
        return contrasts


class Point(NamedTuple):
    """params.yaml with one combination of a grid's settings."""

    name: str  # the same for the same settings
    grid: Grid
    labels: dict[str, Any]  # what the grid varies: by its name or dotted parameter
    settings: dict[str, Any]  # by dotted parameter: all that the study names
    params: Params


def main(**options: Any) -> None:
    """Run or collect: `options` are those of the command line."""
    arguments = argparse.Namespace(**options)
    if any(number is not None and number < 1 for number in (arguments.threads, arguments.workers, arguments.per_gpu)):
        raise UserError("--threads, --workers and --per-gpu are at least 1")
    study, points = load_study(arguments.study, arguments.threads)
    parts, claims = sections(points), (study.contrasts, study.secondary)
    asked = [[ask(contrast, points, arguments.study) for contrast in part] for part in claims]
    plans = {point.name: plan(point.params) for point in points}
    if arguments.action == "collect":
        paths = {name: path for name, tasks in plans.items() if (path := result_path(tasks[-1].digest)).is_file()}
        if not paths:
            raise UserError(f"study {arguments.study}: no finished point by this code: make study STUDY={arguments.study}")
        settings = {point.name: point.settings for point in points}
        findings = find(arguments.study, parts, *asked, settings, paths)
        print(write_pages(findings, ROOT / "metrics" / "studies"))
    else:
        run(arguments, plans, points[0].params.tracking.experiment)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("action", choices=["run", "collect"])
    parser.add_argument("study", help="a file studies/<study>.yaml")
    parser.add_argument("--one-by-one", action="store_true", help="run in this process, without Ray")
    parser.add_argument("--threads", type=int, help="that a task computes with (default: those of params.yaml)")
    parser.add_argument("--workers", type=int, help="tasks at a time on this machine (default: cores / threads)")
    parser.add_argument("--per-gpu", type=int, default=4, help="tasks that share a GPU (default 4)")
    return parser


def load_study(name: str, threads: int | None = None) -> tuple[Study, list[Point]]:
    """studies/<name>.yaml and its points, grid by grid, with these threads unless None. Raises UserError for a bad file."""
    path, params = ROOT / "studies" / f"{name}.yaml", load_params(ROOT / "params.yaml").model_dump()
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(f"{path}: no such study; there are: {names}")
    combinations, last = [], {"threads": threads} if threads else {}
    try:
        study = _with_names(Study.model_validate(read_yaml(path)), path)
        for grid in study.grids:
            for key, chosen in (("x", [grid.x] if grid.x else []), ("reference", grid.reference)):
                if unknown := [name for name in chosen if name not in grid.vary]:
                    raise UserError(
                        f"{path}: {grid.title}: {key} = {unknown[0]!r} is not varied; what is: {', '.join(grid.vary)}"
                    )
            if (count := math.prod(map(len, grid.vary.values()))) > MOST_POINTS:
                raise UserError(f"{path}: {grid.title}: {count:,} points, more than {MOST_POINTS:,}")
            for values in itertools.product(*(choices(*item) for item in grid.vary.items())):
                settings = [study.fixed, grid.fixed, *(setting for _, setting in values), last]
                names = {key: label for labels, _ in values for key, label in labels.items()}
                combinations.append((grid, names, Params.model_validate(functools.reduce(merge, settings, params))))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key} = {shown(problem['input'])}: {problem['msg']}") from error
    for grid in study.grids:
        if grid.x and not all(isinstance(value, int | float) and value > 0 for value in grid.vary[grid.x]):
            raise UserError(f"{path}: {grid.title}: x = {grid.x!r} has values that are no positive numbers: they make no axis")
    blocks = [study.fixed, *(grid.fixed for grid in study.grids)]
    blocks += [setting for grid in study.grids for item in grid.vary.items() for _, setting in choices(*item)]
    keys = dict.fromkeys(key for block in blocks for item in block.items() for key in spelt(*item))
    parameters = combinations[0][2].values(*Params.model_fields)
    if unknown := [key for key in keys if not any(f"{name}.".startswith(f"{key}.") for name in parameters)]:
        raise UserError(f"{path}: {unknown[0]}: not a parameter")
    points = []
    for grid, names, point in combinations:
        digest = hashlib.sha256(json.dumps(point.values(*keys), sort_keys=True).encode()).hexdigest()
        labels = {key: point.flat(key)[key] if label is None else label for key, label in names.items()}
        points.append(Point(f"{name}-{digest[:8]}", grid, labels, point.flat(*keys), point))
    return study, points


def _with_names(study: Study, path: Path) -> Study:
    """The study with the settings of `named` in the place of their names."""
    grids = []
    for grid in study.grids:
        vary = dict(grid.vary)
        for key in study.named.keys() & vary.keys():
            if isinstance(vary[key], dict):
                raise UserError(f"{path}: {grid.title}: {key} has settings here and in `named`: list the names alone")
            if unknown := [name for name in vary[key] if not (isinstance(name, str) and name in study.named[key])]:
                raise UserError(f"{path}: {grid.title}: {key} = {shown(unknown[0])} is none of {', '.join(study.named[key])}")
            vary[key] = {name: study.named[key][name] for name in vary[key]}
        grids.append(grid.model_copy(update={"vary": vary}))
    return study.model_copy(update={"grids": grids})


def choices(key: str, values: list[Any] | dict[str, Settings]) -> list[tuple[dict[str, str | None], Settings]]:
    """What a varied key may be: its labels (a name, or None for parameters, whose values label them) and its settings."""
    if isinstance(values, dict):
        return [({key: name}, settings) for name, settings in values.items()]
    return [(dict.fromkeys(name for value in values for name in spelt(key, value)), {key: value}) for value in values]


def spelt(key: str, value: Any) -> dict[str, Any]:
    """Values by dotted parameter, of a block's mapping or of one parameter."""
    return {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}


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


def pick(at: Settings, points: list[Point], where: str) -> Point:
    """The point that `at` describes. Raises UserError if none does or several do."""
    wanted = {part: value for item in at.items() for part, value in spelt(*item).items()}
    named = {"grid"} | {key for point in points for key, values in point.grid.vary.items() if isinstance(values, dict)}
    matching = {}
    for point in points:
        names = dict.fromkeys(named) | point.labels | {"grid": point.grid.title}
        try:
            values = {key: names[key] if key in named else point.params.values(key)[key] for key in wanted}
        except (AttributeError, KeyError) as error:
            raise UserError(f"{where}: {shown(at)}: not a parameter, nor a name of settings: {error}") from error
        if values == wanted:
            matching[point.name] = point
    if len(matching) != 1:
        raise UserError(f"{where}: {shown(at)} describes {len(matching)} points, not one")
    return matching.popitem()[1]


def ask(contrast: Contrast, points: list[Point], where: str) -> Question:
    """What a contrast asks of the results. Raises UserError if it does not pick its points, or if they have other seeds."""
    where = f"{where}: {contrast.title}"
    point = pick(contrast.at, points, where)
    other = point if contrast.other_at is None else pick(contrast.other_at, points, where)
    terms = [(1, point.name, contrast.model), (-1, other.name, contrast.other)]
    picked = [point, other]
    if contrast.minus_at is not None:
        picked.append(less := pick(contrast.minus_at, points, where))
        terms += [(-1, less.name, contrast.model), (1, less.name, contrast.other)]
    if len({tuple(place.params.seeds) for place in picked}) > 1:
        raise UserError(f"{where}: the points have other seeds: nothing to pair")
    verdicts = point.params.evaluation
    margin = verdicts.margin if contrast.margin is None else contrast.margin
    return Question(contrast.title, tuple(terms), contrast.metric or verdicts.primary, contrast.split, contrast.claim, margin)


def sections(points: list[Point]) -> list[Section]:
    """The points by grid and metric. Raises UserError if a grid's reference is none of its points."""
    parts: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        parts.setdefault((id(point.grid), point.params.evaluation.primary), []).append(point)
    return [_section(part) for part in parts.values()]


def _distils_alike(point: Point, other: Point) -> bool:
    """Whether the two points' distilled students are the same trainings: then there is nothing to compare."""
    facts = [
        [p.seeds, *(p.training("distillation", model) for model in ("teacher", "student_distilled"))]
        for p in (point.params, other.params)
    ]
    return facts[0] == facts[1]


def _section(points: list[Point]) -> Section:
    grid, rows = points[0].grid, []
    reference = {part: value for item in grid.reference.items() for part, value in spelt(*item).items()}

    def question(point: Point, other: Point, model: str) -> Question:
        terms, verdicts = ((1, point.name, "student_distilled"), (-1, other.name, model)), point.params.evaluation
        return Question(grid.title, terms, verdicts.primary, "test", "better", verdicts.margin)

    for point in points:
        compared = [other for other in points if reference and other.labels == point.labels | reference]
        if reference and not compared:
            raise UserError(f"{grid.title}: no point has reference = {shown(grid.reference)}")
        against = [question(point, other, "student_distilled") for other in compared if not _distils_alike(point, other)]
        rows.append(Row(point.name, point.labels, question(point, point, "student_alone"), against[0] if against else None))
    return Section(grid.title, grid.x, ", ".join(map(str, reference.values())), rows)


if __name__ == "__main__":
    cli.run(main, _options())
