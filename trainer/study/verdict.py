"""From the scores of all runs to the sign of each claim.

A claim is a sum of cells' means; its error comes from the spread over seeds (Welch: each cell has its own). It holds,
or its opposite does, where the sum is off its bound by more than Student's t at 95%, one-sided. With one seed there is
no error, and the sign of the difference is all that can be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, variance
from typing import Any, NamedTuple

from trainer.study.settings import Claim, StudySettings

STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
"""Quantiles 0.95 of Student's t for 1, 2, ... degrees of freedom; beyond them 1.7 is near enough."""
SAME, OPPOSITE, UNDECIDED, NOT_RUN = "same sign", "opposite sign", "undecided", "not run"
Cell = tuple[str, str]
"""Contestant and label of the column."""
Scores = Mapping[Cell, Sequence[float]]
"""One metric of each cell that has run, a value a seed."""


class Result(NamedTuple):
    """A value and its standard error; None where there is only one seed."""

    value: float
    error: float | None


def summary(values: Sequence[float]) -> Result:
    """Mean and its standard error over seeds."""
    return Result(mean(values), math.sqrt(variance(values) / len(values)) if len(values) > 1 else None)


def judge(claim: Claim, scores: Scores) -> dict[str, Any]:
    """What a claim's sum is, and what that says of it."""
    cells = [(term.sign, scores.get((term.contestant, term.label), ())) for term in claim.terms]
    told = {"claim": claim.text}
    if not all(values for _, values in cells):
        return told | {"value": None, "error": None, "verdict": NOT_RUN}
    margin = sum(sign * mean(values) for sign, values in cells) - claim.bound
    freedom = sum(len(values) - 1 for _, values in cells)
    error = None
    needed = 0.0
    if all(len(values) > 1 for _, values in cells):
        error = math.sqrt(sum(variance(values) / len(values) for _, values in cells))
        needed = error * (STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.7)
    verdict = SAME if margin > needed else OPPOSITE if margin < -needed else UNDECIDED
    return told | {"value": margin + claim.bound, "error": error, "verdict": verdict}


def judge_all(study: StudySettings, scores: Mapping[str, Scores]) -> tuple[str, list[dict[str, Any]]]:
    """(the study's verdict, each claim's); ``scores`` by metric. All must have the paper's sign; one opposite is
    enough against it."""
    claims = [judge(claim, scores.get(claim.metric or next(iter(study.metrics)), {})) for claim in study.sign]
    verdicts = [claim["verdict"] for claim in claims]
    worst = next((kind for kind in (NOT_RUN, OPPOSITE, UNDECIDED) if kind in verdicts), SAME)
    return worst, claims
