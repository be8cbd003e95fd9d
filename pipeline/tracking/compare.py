"""Compare experiments, git revisions and the workspace by their figures.

    make compare                  every experiment of this checkout: what it varies, and its figures
    make compare A=t5 B=t6        is B more accurate than A: the same paired verdict as in the report, model by model

A and B are names of experiments, revisions such as HEAD, or `workspace`. Their predictions come from DVC's cache.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from pipeline.core.cli import run
from pipeline.core.errors import UserError
from pipeline.core.provenance import committed_parameters, git
from pipeline.evaluation.comparisons import Evaluation, read_evaluation
from pipeline.evaluation.statistics import compare
from pipeline.params import TRACKS

EXPERIMENT = re.compile(r"(\w+) refs/exps/\w\w/\w{38}/(.+)")  # revision and name


def main(a: str, b: str) -> None:
    """Print the table or, of two, the verdicts."""
    if bool(a) != bool(b):
        raise UserError("two are compared: make compare A=... B=..., or none: make compare")
    print("\n".join(verdicts(a, b)) if a else table())


def table() -> str:
    """A row per experiment: the parameters that differ among them, then the headline figures that do; shares of 1."""
    references = git("for-each-ref", "--format=%(objectname) %(refname)", "--sort=creatordate", "refs/exps")
    revisions = {"HEAD": "HEAD"} | {name: revision for revision, name in EXPERIMENT.findall(references)}
    rows = {name: committed_parameters(revision) | _headline(revision) for name, revision in revisions.items()}
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    varied = [key for key in keys if len({str(row.get(key)) for row in rows.values()}) > 1]
    if not varied:
        return "no experiment differs from HEAD: dvc exp run --temp --name t6 -S kd.temperature=6 report@distillation"
    cells = [[name, *(_cell(row.get(key)) for key in varied)] for name, row in rows.items()]
    return tabulate(cells, ["experiment", *varied], disable_numparse=True)


def _headline(revision: str) -> dict[str, float]:
    figures = {}
    for track in TRACKS:
        content = git("show", f"{revision}:metrics/{track}.json")
        for name, value in (json.loads(content) if content else {}).items():
            figures |= {f"{name}.{key}": figure for key, figure in value.items()} if isinstance(value, dict) else {name: value}
    return figures


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) and abs(value) < 1 else str(value)


def verdicts(a: str, b: str) -> list[str]:
    """Per track and model of both: is `b` more accurate than `a`, over the seeds that they share. Raises UserError."""
    lines = []
    for track in TRACKS:
        readers = _reader(a), _reader(b)
        try:
            ours, theirs = (read_evaluation(track, reader) for reader in reversed(readers))
        except UserError as error:
            reason = error
            continue
        lines += [_verdict(f"{b} against {a}, {model}", model, ours, theirs) for model in ours.metrics]
    if not lines:
        raise UserError(f"{a}, {b}: no track has results in both: {reason}")
    return lines


def _reader(revision: str) -> Callable[[str], bytes]:
    """How files of a revision are read, from git or DVC's cache."""
    if revision == "workspace":
        return lambda path: Path(path).read_bytes()
    from dvc.api import DVCFileSystem

    try:
        return DVCFileSystem(rev=revision).cat_file
    except Exception as error:
        raise UserError(f"{revision}: neither a DVC experiment nor a git revision here: {error}") from error


def _verdict(heading: str, model: str, ours: Evaluation, theirs: Evaluation) -> str:
    details = [evaluation.detail["models"][model] for evaluation in (ours, theirs)]
    if details[0]["checkpoints"] == details[1]["checkpoints"]:
        return f"{heading}: the same checkpoints"
    if ours.detail["dataset"]["fingerprint"] != theirs.detail["dataset"]["fingerprint"]:
        return f"{heading}: measured on other images: {ours.detail['dataset']['name']}, {theirs.detail['dataset']['name']}"
    seeds = [seed for seed in details[0]["seeds"] if seed in details[1]["seeds"]]
    if not seeds:
        return f"{heading}: no seed in common"
    correct = [
        np.stack([evaluation.probabilities[model][detail["seeds"].index(seed)].argmax(1) == evaluation.labels for seed in seeds])
        for evaluation, detail in zip((ours, theirs), details, strict=True)
    ]
    comparison = compare(*correct)
    gain, low, high = (f"{100 * share:+.2f}" for share in (comparison.gain, comparison.low, comparison.high))
    extent = f"95 % interval {low} to {high}, {comparison.seeds} seeds, {comparison.images:,} images"
    return f"{heading}: {comparison.verdict}, {gain} points ({extent})"


if __name__ == "__main__":
    run(main, a=None, b=None)
