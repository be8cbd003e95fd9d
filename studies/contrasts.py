"""A study's questions, and the answers that its finished points give, corrected for their number."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from pipeline.core.errors import UserError
from pipeline.data.npy import read_npz
from pipeline.evaluation.jackknife import FIGURES, LOWER_IS_BETTER
from pipeline.evaluation.statistics import CONFIDENCE, Comparison, analyse, by_seed
from pipeline.reporting.report import nothing_differed

CALIBRATED = "_calibrated"  # the end of a figure's name: after temperature scaling on validation images
METRICS = (*FIGURES, *(f"{name}{CALIBRATED}" for name in LOWER_IS_BETTER))
ALPHA = 0.05


class Question(NamedTuple):
    """A difference between models, and what is claimed of it."""

    title: str
    terms: tuple[tuple[int, str, str], ...]  # that it is the sum of: sign, point's name, model
    metric: str  # one of METRICS
    split: str  # test or val
    claim: str  # better | equivalent | not_inferior | better_or_equivalent
    margin: float

    @property
    def test(self) -> tuple[Any, ...]:
        """What two questions have in common that are one test."""
        return self[1:5] if self.claim == "better" else self[1:]

    @property
    def figure(self) -> str:
        """The metric's unit is that of this one in jackknife.FIGURES."""
        return self.metric.removesuffix(CALIBRATED)


class Row(NamedTuple):
    """A point in a section."""

    point: str  # its name
    labels: dict[str, Any]  # what tells it from the section's other points: values by parameter, or a name of settings
    gain: Question  # the distilled student against the same one alone
    against: Question | None  # the distilled student against that of the section's reference


class Section(NamedTuple):
    """A grid's points of one metric."""

    title: str
    x: str | None  # the label that is the figure's horizontal axis; None: a row per point
    reference: str  # whose distilled student `against` is about, if any is
    rows: list[Row]


class Findings(NamedTuple):
    """A study's questions and what is known of the answers."""

    name: str
    sections: Sequence[Section]
    contrasts: Sequence[Question]  # the fixed sequence
    secondary: Sequence[Question]
    settings: Mapping[str, Mapping[str, Any]]  # by point: what the study names
    paths: Mapping[str, Path]  # by finished point: its result, as in `tasks.result_path`
    answers: Mapping[tuple[Any, ...], Comparison | None]  # by `Question.test`; None: a point of it is missing
    holm: Mapping[tuple[Any, ...], float]  # corrected p values of all that is in no fixed sequence

    @property
    def rows(self) -> dict[str, Row]:
        """By point."""
        return {row.point: row for section in self.sections for row in section.rows}


def find(
    name: str,
    sections: Sequence[Section],
    contrasts: Sequence[Question],
    secondary: Sequence[Question],
    settings: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, Path],
) -> Findings:
    """Answer all questions, as far as their points have finished. Raises UserError where models cannot be paired."""
    rows = [row for section in sections for row in section.rows]
    others = [question for row in rows for question in (row.gain, row.against) if question] + list(secondary)
    answers = {question.test: compare(question, paths) for question in [*contrasts, *others]}
    of_sequence = {question.test[:length] for question in contrasts for length in (3, 4)}  # without and with its claim
    family = {
        q.test: p_value(answers[q.test], q.claim, q.margin)
        for q in others
        if q.test[: 4 if q in secondary else 3] not in of_sequence
    }
    corrected = dict(zip(family, holm(pd.Series(list(family.values()), dtype=float)), strict=True))
    return Findings(name, sections, contrasts, secondary, settings, paths, answers, corrected)


@functools.cache
def jackknifed(path: Path, split: str, model: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,), a figure by seed (S,), and the same without each image (S, N), of one model in a result. Raises UserError."""
    labels, probabilities = _predictions(path, split, model)
    if metric.endswith(CALIBRATED):
        from pipeline.evaluation.calibration import fit_temperature, scaled
        from pipeline.evaluation.comparisons import tested

        val_labels, val = _predictions(path, "val", model)
        temperatures = [fit_temperature(*tested(val_labels, of_seed)) for of_seed in val]
        probabilities = [scaled(of_seed, by) for of_seed, by in zip(probabilities, temperatures, strict=True)]
    return labels, *by_seed(FIGURES[metric.removesuffix(CALIBRATED)], labels, np.stack(probabilities))


def _predictions(path: Path, split: str, model: str) -> tuple[np.ndarray, np.ndarray]:
    names = f"{split}_labels", f"{split}_{model}"
    arrays = read_npz(path := path.with_suffix(".npz"), names)
    if len(arrays) < len(names):
        raise UserError(f"{path}: no {split} images: a contrast needs them")
    return arrays[names[0]], arrays[names[1]]


def compare(question: Question, paths: Mapping[str, Path]) -> Comparison | None:
    """The answer to a question; None while a point of it is missing. Raises UserError if its points have other images."""
    if any(point not in paths for _, point, _ in question.terms):
        return None
    parts = [jackknifed(paths[point], question.split, model, question.metric) for _, point, model in question.terms]
    labels, *_ = parts[0]
    masks = [np.isnan(part[2]) for part in parts]  # which images a seed does not test, in a cross-validation
    alike = all(np.array_equal(part[0], labels) for part in parts) and all(np.array_equal(mask, masks[0]) for mask in masks)
    if not alike:
        raise UserError(f"{question.title}: the points have other {question.split} images or seeds: nothing to pair")
    signs = [sign * (-1 if question.figure in LOWER_IS_BETTER else 1) for sign, *_ in question.terms]
    gains, without = (sum(sign * part[place] for sign, part in zip(signs, parts, strict=True)) for place in (1, 2))
    patients = read_npz(paths[question.terms[0][1]].with_suffix(".npz"), ["patients"]).get("patients")
    whose = patients if question.split == "test" else None
    return analyse(gains.tolist(), without, question.figure, question.margin, labels, whose)


def outcome(answer: Comparison, claim: str) -> str:
    """What of a claim is shown by itself, or "": by the 95 % interval or, of equivalence, by two one-sided tests at 5 %."""
    if claim == "better_or_equivalent":
        # At 5 % together: where both are false, either needs a 90 % interval above -margin, or below margin.
        return outcome(answer, "better") or outcome(answer, "equivalent")
    shown = {"better": answer.low > 0, "equivalent": answer.equivalent}
    shown["not_inferior"] = answer.low > -answer.margin and not nothing_differed(answer.as_json())
    return claim.replace("_", " ") if answer.enough and shown[claim] else ""


def p_value(answer: Comparison | None, claim: str, margin: float) -> float:
    """Below 5 % where `outcome` shows the claim (or, of better, its reverse); 1 where seeds, images or points are missing."""
    if answer is None or not answer.enough:
        return 1.0
    if claim == "better":
        return answer.p
    if nothing_differed(answer.as_json()):
        return 1.0
    error = (answer.high - answer.low) / 2 / t.ppf((1 + CONFIDENCE) / 2, answer.df)
    with np.errstate(divide="ignore"):
        below, above = t.sf(np.divide([margin + answer.gain, margin - answer.gain], error), answer.df)
    return float(min(1, 2 * below) if claim == "not_inferior" else max(below, above))


def holm(p: pd.Series) -> pd.Series:
    """Values of p corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65-70)."""
    ordered = p.sort_values()
    return (ordered * np.arange(len(p), 0, -1)).cummax().clip(upper=1)[p.index]


def sequence(found: Findings) -> list[str]:
    """What becomes of each claim of the fixed sequence, which ends at the first that is not shown."""
    outcomes: list[str] = []
    for question in found.contrasts:
        ended = {"not run", "not shown"} & set(outcomes)
        if (answer := found.answers[question.test]) is None:
            outcomes.append("not run")
        else:
            outcomes.append("not tested" if ended else outcome(answer, question.claim) or "not shown")
    return outcomes
