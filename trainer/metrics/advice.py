"""One line when a run learns nothing, diverges, collapses, contradicts itself with equal captions, or loses its
temperature: what is seen, the likely causes in order, and the keys to change.

    advisor = Advisor(Situation.of(recipe.model_dump()))
    for text in advisor.hear(record):                      # a line of log.jsonl, with its vitals
        logger.warning(text)

People ask these questions in openai/CLIP #83 and #362 and in open_clip #17, #742, #815 and #821. Every kind of advice
is given once per start of a run. The first lines of a run are no evidence: a new model begins at chance, collapsed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.metrics.vitals import SAMPLE

WINDOW = 10
"""Lines whose means are judged."""
STEPS = 100
"""No advice on what has not been learned before this step, ..."""
PATIENCE, LONG, SHARE = 1.5, 0.3, 0.05
"""... this many times the warm-up (but no more than LONG of the run), and this share of the run."""
FAST, SLOW = 0.02, 1e-5
"""Steps that move a tower by more, or never by more, of its weights; 0.001 to 0.005 is usual at the peak rate."""
NOTHING, LEARNT = 0.1, 0.5
"""Distance of matched from other pairs, in standard deviations of the latter, below which nothing and above which
something has been learnt."""
POINT = 0.97
"""Mean cosine of images (captions) from which they are a point."""
REPEATED = 0.3
"""Share of pairs with another one's caption from which negatives among them are worth a line."""


@dataclass(frozen=True)
class Situation:
    """What the recipe says."""

    batch: int
    total: int
    """Samples of the whole run."""
    warmup: float
    """Samples."""
    loss: str
    chance: float | None
    """The loss of a model that cannot tell pairs apart, where it is known."""
    same_group: str
    kept: str
    """Which negatives count: "hardest", "easiest", or ""."""
    head: float
    """Factor on the rate of the temperature."""
    noise: float
    """Share of pairings that are spoiled on purpose."""

    @classmethod
    def of(cls, recipe: dict[str, Any]) -> Situation:
        """From a recipe in which nothing is `auto` any more, as nested dicts."""
        batch, total, loss, optim = recipe["batch"]["size"], recipe["run"]["samples"], recipe["loss"], recipe["optim"]
        negatives = loss.get("negatives") or {}
        kept = negatives["keep"] if negatives.get("ratio") and negatives["keep"] != "random" else ""
        # Easy negatives cost little though nothing is learned; a growing ratio moves the loss by itself.
        plain = not recipe.get("distill") and not negatives.get("warmup") and not kept
        warmup = optim["warmup"] * total if optim["warmup"] < 1 else optim["warmup"]
        return cls(
            batch=batch,
            total=total,
            warmup=warmup,
            loss=loss["name"],
            chance=chance_of(loss["name"], batch, negatives) if plain else None,
            same_group=loss.get("same_group", ""),
            kept=kept,
            head=recipe["model"]["rates"]["head"],
            noise=max(recipe["data"]["noise"].values()),
        )


def chance_of(loss: str, batch: int, negatives: dict[str, Any] | None = None) -> float | None:
    """The least loss with equal logits: ln B of a softmax; ln (1 + r) + r ln (1 + 1/r) of a sigmoid with r negatives a
    positive, whose best logit is -ln r."""
    if loss == "softmax":
        return math.log(batch) if batch > 1 else None
    if loss != "sigmoid" or batch < 2:
        return None
    negatives = negatives or {}
    ratio = min(negatives.get("ratio") or batch, batch - 1) * negatives.get("weight", 1.0)
    return math.log1p(ratio) + ratio * math.log1p(1 / ratio) if ratio else None


class Advisor:
    """Hears the lines of one run, in order."""

    def __init__(self, situation: Situation) -> None:
        self.situation = situation
        self._lines: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._given: set[str] = set()
        self._first: dict[str, float] = {}
        self._best = math.inf
        """The least mean loss of a window."""
        self._farthest = 0.0
        """The largest mean distance of matched from other pairs, in standard deviations of the latter."""
        self._fastest = 0.0
        """The farthest that a step moved a tower, relative to its weights."""

    def hear(self, record: dict[str, Any]) -> list[str]:
        """Advice on the run as of ``record``; mostly none."""
        if record["loss"] is None or not math.isfinite(record["loss"]) or not record.get("vitals"):
            return self._once("diverges", self._bad_steps(record["bad_steps"]))
        line: dict[str, float] = {key: record[key] for key in ("step", "samples_seen", "loss", "scale", "bad_steps")}
        line |= record["vitals"]
        line["apart"] = (line["logit_matched"] - line["logit_other"]) / max(line["logit_other_std"], 1e-9)
        self._lines.append(line)
        self._first = self._first or line
        self._fastest = max(self._fastest, *(line.get(f"update_{tower}", 0.0) for tower in ("image", "text")))
        if len(self._lines) < WINDOW:
            return []
        now = {key: sum(one[key] for one in self._lines) / WINDOW for key in line}
        found = [text for kind, seen in self._seen(now, line) for text in self._once(kind, seen, now)]
        self._best, self._farthest = min(self._best, now["loss"]), max(self._farthest, now["apart"])
        return found

    def _once(self, kind: str, seen: str, now: dict[str, float] | None = None) -> list[str]:
        """The line, unless it is known; of a run at chance or in ruins nothing more is said."""
        if not seen or kind in self._given or (self._given & {"diverges", "learns nothing", "collapses"}):
            return []
        self._given.add(kind)
        return [f"this run {kind}: {seen}. Likely causes, in order: {'; '.join(self._causes(kind, now or {}))}"]

    def _seen(self, now: dict[str, float], last: dict[str, float]) -> Iterator[tuple[str, str]]:
        """(kind, what shows it; empty if nothing does) of everything that may be wrong, the worst first."""
        s = self.situation
        wait = max(min(PATIENCE * s.warmup, LONG * s.total), SHARE * s.total)
        early = last["step"] < STEPS or last["samples_seen"] < wait
        yield "diverges", self._diverges(now)
        fallen = now["scale"] < 0.5 * self._first["scale"]
        what = f"t has fallen from {self._first['scale']:.3g} to {last['scale']:.3g}, so its logits say less and less"
        yield "loses its temperature", what if fallen and not early else ""
        yield "learns nothing", "" if early else self._at_chance(now)
        yield "collapses", "" if early else self._collapses(now)
        repeated = now["repeated"] >= REPEATED and s.same_group == "negative"
        what = f"{now['repeated']:.0%} of a batch's captions occur more than once, and count as negatives of each other"
        yield "contradicts itself", what if repeated else ""

    def _bad_steps(self, count: int) -> str:
        last = self._lines[-1] if self._lines else {"bad_steps": 0, "step": 0}
        bad = count - last["bad_steps"]
        return f"{bad} steps since step {last['step']:,} had no finite loss or gradient" if bad > 1 else ""

    def _diverges(self, now: dict[str, float]) -> str:
        rise = (now["loss"] - self._best) / (self.situation.chance or self._first["loss"] or 1.0)
        # A global loss rises by itself as its gamma falls: the logarithm of a mean over batches is above the mean of
        # their logarithms.
        higher = self.situation.loss != "global" and (rise > 0.5 or (rise > 0.1 and self._fastest > FAST))
        gone = now["apart"] < NOTHING and self._farthest > LEARNT
        return f"the loss was {self._best:.3g} and is {now['loss']:.3g}" if gone or higher else ""

    def _at_chance(self, now: dict[str, float]) -> str:
        """Matched pairs do not stand out, and the loss, where it can be compared, is that of guessing."""
        s, number = self.situation, min(self.situation.batch, SAMPLE)
        if now["apart"] > NOTHING or (s.chance is not None and now["loss"] < 0.96 * s.chance):
            return ""
        known = f", that of guessing is {s.chance:.3g}" if s.chance is not None else ""
        recall = (now["image_to_text_r1"] + now["text_to_image_r1"]) / 2
        collapsed = self._collapses(now)
        return (
            f"the loss is {now['loss']:.3g}{known}; of {number} pairs {recall:.1%} are retrieved ({1 / number:.1%} by "
            f"chance){'; ' if collapsed else ''}{collapsed}"
        )

    def _collapses(self, now: dict[str, float]) -> str:
        sides = [name for key, name in (("images", "images"), ("texts", "captions")) if now[f"cosine_{key}"] > POINT]
        if now["apart"] > LEARNT or not sides:
            return ""
        return f"the embeddings of all {' and '.join(sides)} are nearly equal"

    def _causes(self, kind: str, now: dict[str, float]) -> Iterator[str]:
        """Those with evidence first."""
        s = self.situation
        rate = "lower optim.lr, raise optim.warmup, set optim.clip=1"
        if self._fastest > FAST:
            yield f"the rate is too high, a step moves a tower by {self._fastest:.1%} of its weights: {rate}"
        elif kind == "diverges":
            yield f"the rate is too high: {rate}, or optim.spike.action=clip"
        if self._fastest < SLOW and kind != "diverges":
            yield (
                f"the towers hardly move ({self._fastest:.0e} of their weights in a step): raise optim.lr, or leave it "
                "out; look at model.lock and model.rates"
            )
        if kind == "loses its temperature" and s.loss == "global":
            yield "its robust loss holds it down: raise loss.rho, or set loss.temperature=fixed"
        if kind == "loses its temperature" and s.head > 10:
            yield f"the temperature's own rate is too high: lower model.rates.head ({s.head:g})"
        if s.noise:
            yield f"data.noise spoils up to {s.noise:.0%} of the pairs"
        if s.loss == "triplet" and kind != "diverges":
            yield "loss.name=triplet hears of the hardest negatives alone: begin with trained towers or another loss"
        if s.kept:
            yield f"loss.negatives keeps the {s.kept} alone: keep all or random ones, or set loss.negatives.warmup"
        if now.get("repeated", 0) >= REPEATED and s.same_group in ("negative", ""):
            key = "mask" if s.loss in ("triplet", "global") else "positive"
            yield f"equal captions are negatives: set loss.same_group={key}, or name richer captions in data.caption"
        if kind != "contradicts itself" and self._fastest >= SLOW:
            yield (
                "captions do not belong to their images, or these are blank: look at some pairs, check data.caption "
                "and the table that was sharded"
            )
        if kind in ("learns nothing", "collapses"):
            steps = s.total // s.batch
            if steps < 1000:
                yield f"{steps:,} steps are few: lower batch.size, or raise run.samples"
            if SLOW <= self._fastest <= FAST:
                yield "the rate does not fit: try a third of optim.lr"
        if kind == "loses its temperature" and s.head <= 10:
            yield "its rate is too high: lower model.rates.head or optim.lr"
