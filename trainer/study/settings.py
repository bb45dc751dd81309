"""A study's YAML: a grid of settings x contestants, what a paper found on it, and when we have found the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from trainer.core.settings import Settings, parse, read_yaml
from trainer.core.shipped import shipped
from trainer.core.types import UserError

Overrides = dict[str, Any]
"""Dotted key of a recipe -> value. In text, {out} is the study's directory and {data} the shards'."""
TERM = re.compile(r"\s*([+-])?\s*([^@+]+?)\s*@\s*(\S+)")


class Term(NamedTuple):
    """A cell's score in a claim, added or subtracted."""

    sign: float
    contestant: str
    label: str


class Claim(Settings):
    """One checkable part of a finding: ``more`` exceeds ``than``."""

    more: str
    "Sums and differences of CONTESTANT @ LABEL: sigmoid @ 32 - softmax @ 32."
    than: str | float
    "Of the same form, or a number."
    by: float = 0.0
    "By how much, in the metric's unit; negative: `more` may be so much less (no loss to speak of)."
    metric: str | None = None
    "Which of the study's metrics; null: the first."

    @property
    def terms(self) -> list[Term]:
        """All that has to be added up; the claim holds where the sum is above ``bound``."""
        subtracted = [] if isinstance(self.than, float) else [t._replace(sign=-t.sign) for t in _terms(self.than)]
        return [*_terms(self.more), *subtracted]

    @property
    def bound(self) -> float:
        return self.by + (self.than if isinstance(self.than, float) else 0.0)

    @property
    def text(self) -> str:
        """The claim in one line."""
        by = f" by {self.by:g}" if self.by > 0 else f", or at most {-self.by:g} less" if self.by < 0 else ""
        return f"{self.more} > {self.than}{by}" + (f" ({self.metric})" if self.metric else "")


class StudySettings(Settings):
    """A study: what is trained, how often, and what counts as the paper's sign."""

    title: str
    "What is compared."
    paper: str
    "Where the finding stands."
    found: str
    "The finding."
    why: str = ""
    "Why we think that our runs show the same, or do not."
    recipe: str = "glyphs"
    "Recipe that all runs share: a shipped name or a file."
    overrides: Overrides = Field(default_factory=dict)
    "Keys of all runs that differ from the recipe."
    prepare: list[str] = Field(default_factory=list)
    "Commands that run once before the grid, in order: `trainer.embed glyphs ...`, without python -m."
    x: str = ""
    "What the columns of the grid vary; the axis of the chart."
    grid: dict[str, Overrides] = Field(default={"all": {}}, min_length=1)
    "Label of a column -> keys of its runs."
    contestants: dict[str, Overrides] = Field(min_length=1)
    "Name -> keys of its runs, which take precedence over the column's."
    metrics: dict[str, str | list[str]] = Field(
        default={"R@1": ["eval.image_to_text_r1", "eval.text_to_image_r1"]}, min_length=1
    )
    """Name -> number of log.jsonl (eval.NAME, vitals.NAME, spikes, ...) at the end of a run, or the mean of several;
    the claims are about the first."""
    seeds: int = Field(default=2, ge=1)
    "Runs of each cell, with run.seed 0, 1, ...; of more than one the standard error is known."
    rates: list[float] = Field(default_factory=list)
    """Factors on optim.lr; each cell is tried with each of them, with a seed of its own, and its runs take the best.
    Empty: the recipe's rate."""
    sign: list[Claim] = Field(min_length=1)
    "The finding in checkable form; all must hold."

    @model_validator(mode="after")
    def _claims_name_cells(self) -> StudySettings:
        for claim in self.sign:
            for term in claim.terms:
                for kind, name, known in (
                    ("contestant", term.contestant, self.contestants),
                    ("column of the grid", term.label, self.grid),
                ):
                    if name not in known:
                        raise ValueError(f"sign: {claim.text!r} names no {kind}: {name!r}; known: {', '.join(known)}")
            if claim.metric is not None and claim.metric not in self.metrics:
                raise ValueError(f"sign: no metric {claim.metric!r}; known: {', '.join(self.metrics)}")
        return self


def load_study(name: str) -> tuple[str, StudySettings]:
    """(name, study) of a shipped one by its name, or in a YAML file. Raises UserError with one line a mistake."""
    folder = shipped("recipes") / "studies"
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise UserError(f"{name}: no such study; RingLIP ships {known}, in {folder}; or name a YAML file")
    tree = read_yaml(path)
    for key in ("grid", "contestants"):  # labels such as 32 are numbers in YAML
        if isinstance(tree.get(key), dict):
            tree[key] = {str(label): overrides or {} for label, overrides in tree[key].items()}
    return path.stem, parse(StudySettings, tree, str(path))


def _terms(text: str) -> list[Term]:
    found = [Term(-1.0 if m[1] == "-" else 1.0, m[2], m[3]) for m in TERM.finditer(text)]
    if not found or TERM.sub("", text).strip():
        raise ValueError(f"sign: {text!r} is not a sum of CONTESTANT @ LABEL")
    return found
