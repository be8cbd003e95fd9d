"""Compare experiments, git revisions and the workspace by their figures.

    make compare                  every experiment of this checkout: what it varies, and its figures
    make compare A=t5 B=t6        is B better than A: the same paired verdict as in the report, model by model

A and B are names of experiments, revisions such as HEAD, or `workspace`. Their predictions come from DVC's cache.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tabulate import tabulate

from pipeline.core.cli import run
from pipeline.core.errors import UserError, one_line, printable
from pipeline.core.provenance import experiments, git, locked_parameters
from pipeline.evaluation.comparisons import Evaluation, read_evaluation
from pipeline.evaluation.statistics import FEWEST, compare
from pipeline.params import TRACKS
from pipeline.reporting.tables import difference, scale, unit

GAINS = ("gain", "gain_low", "gain_high")


def main(a: str, b: str) -> None:
    """Print the table or, of two, the verdicts."""
    if bool(a) != bool(b):
        raise UserError("two are compared: make compare A=... B=..., or none: make compare")
    for line in verdicts(a, b) if a else table().splitlines():
        print(printable(line))  # of anybody's experiment


def revisions() -> dict[str, str]:
    """The revision of every experiment of this checkout, by name, oldest first."""
    return {name: revision for revision, _, name in experiments("--sort=creatordate")}


def table() -> str:
    """A row per experiment: the parameters of its results that differ among them, then figures, in percent, and gains that do."""
    rows = {
        name: locked_parameters(revision) | _headline(name, revision)
        for name, revision in ({"HEAD": "HEAD"} | revisions()).items()
    }
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    varied = [key for key in keys if len({str(row.get(key)) for row in rows.values()}) > 1]
    if not varied:
        return "no experiment differs from HEAD: dvc exp run --temp --name t6 -S kd.temperature=6 report@distillation"
    cells = [[name, *(row.get(key, "") for key in varied)] for name, row in rows.items()]
    return tabulate(cells, ["experiment", *varied], disable_numparse=True)


def _headline(name: str, revision: str) -> dict[str, str]:
    """The figures of metrics/<track>.json, as text; those of a damaged or older file are left out with a line."""
    figures = {}
    for track in TRACKS:
        try:
            headline = json.loads(git("show", f"{revision}:./metrics/{track}.json") or "{}")
            models = {model: of_model for model, of_model in headline.items() if model not in GAINS}
            (metric, *_) = next(iter(models.values()), {"accuracy": 0})
            row = {f"{track} figure": metric}
            row |= {model: f"{scale(metric) * of_model[metric]:.2f}" for model, of_model in models.items()}
            gains = {key: headline[key] for key in GAINS if key in headline}
            row |= {f"{track} {key.replace('_', ' ')}": difference(metric, value) for key, value in gains.items()}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            print(f"left out: {name}: metrics/{track}.json: {one_line(error)}", file=sys.stderr)
            continue
        figures |= row
    return figures


def verdicts(a: str, b: str) -> list[str]:
    """Per track and model of both: is `b` better than `a`, over the seeds that they share. Raises UserError."""
    readers, lines, reason = [_reader(a), _reader(b)], [], None
    for track in TRACKS:
        try:
            theirs, ours = (read_evaluation(track, reader) for reader in readers)
            both = [model for model in ours.metrics if model in theirs.metrics]
            lines += [_verdict(f"{b} against {a}, {model}", model, ours, theirs) for model in both]
        except Exception as error:  # of a dozen types, on whatever anybody's experiment has in these files
            reason = error
            if not isinstance(error.__cause__, FileNotFoundError):
                print(f"left out: {track}: {one_line(error)}", file=sys.stderr)
    if not lines:
        raise UserError(f"{a}, {b}: no track has results in both (dvc fetch may bring them): {reason}")
    return lines


def _reader(name: str) -> Callable[[str], bytes]:
    """How files of an experiment, a revision or the workspace are read, from git or DVC's cache. Raises UserError."""
    if name == "workspace":
        return lambda path: Path(path).read_bytes()
    revision = revisions().get(name) or git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
    if not revision:
        raise UserError(f"{name}: no experiment and no git revision here. Experiments: {', '.join(revisions()) or 'none'}")
    from dvc.api import DVCFileSystem

    return DVCFileSystem(rev=revision).cat_file


def _verdict(heading: str, model: str, ours: Evaluation, theirs: Evaluation) -> str:
    details = [evaluation.detail["models"][model] for evaluation in (ours, theirs)]
    if details[0]["checkpoints"] == details[1]["checkpoints"]:
        return f"{heading}: the same checkpoints"
    if ours.detail["dataset"]["fingerprint"] != theirs.detail["dataset"]["fingerprint"]:
        names = f"{ours.detail['dataset']['name']}, {theirs.detail['dataset']['name']}"
        return f"{heading}: not compared, the data or their split differ: {names}"
    if not np.array_equal(ours.labels, theirs.labels):
        raise UserError(f"{model}: the two have other labels for the same images")
    seeds = [seed for seed in details[0]["seeds"] if seed in details[1]["seeds"]]
    if not seeds:
        return f"{heading}: no seed in common"
    both = [
        evaluation.probabilities[model][[detail["seeds"].index(seed) for seed in seeds]]
        for evaluation, detail in zip((ours, theirs), details, strict=True)
    ]
    answer = next(iter(ours.comparisons.values()))
    if not 0 <= answer["margin"] <= 1:
        raise UserError(f"{model}: a margin of {answer['margin']}")
    patients = theirs.patients if ours.patients is None else ours.patients
    comparison = compare(ours.labels, *both, answer["metric"], answer["margin"], patients)
    gain, low, high = (difference(comparison.metric, value) for value in (comparison.gain, comparison.low, comparison.high))
    gain += f" {unit(comparison.metric)}"
    extent = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}, {comparison.images:,} images"
    if comparison.seeds < FEWEST:
        return f"{heading}: a smoke test, no evidence, {gain} ({extent})"
    return f"{heading}: {comparison.verdict}, {gain} (95 % interval {low} to {high}, {extent})"


if __name__ == "__main__":
    run(main, a=None, b=None)
