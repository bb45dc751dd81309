"""Which negatives the sigmoid loss keeps, and how much they count: SigLIP's figure 6 (arXiv 2303.15343, section 4.8)
and relatives.

    keep     random: each negative with equal probability; hardest / easiest: those of highest / lowest logit in
             the global batch
    ratio    negatives kept per matched pair; None keeps all B - 1
    warmup   the ratio grows geometrically from 1 to its end value over this fraction of the run (proposed in
             openai/CLIP #25)
    weight   factor on every kept negative (proposed there too: B - 1 negatives outweigh one positive)

The hardest K of B (B - 1) logits are chosen by the value of the K-th: a radix select over the bits of float32, upper
half then lower half, each one more sweep over the tiles (a third of the full cost) and one sum of 65536 counts over
ranks. Memory stays flat, and the choice is exact (logits equal to the K-th are all kept). SigLIP compares at equal
numbers of *pairs seen*: ``matched_samples`` lengthens a run for it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer.core.settings import Settings
from trainer.losses.tiles import Pairs, Tile

BINS = 1 << 16


class NegativeSettings(Settings):
    """Negatives kept and their weight; the defaults keep all, as SigLIP does."""

    keep: Literal["random", "hardest", "easiest"] = "random"
    """Which negatives to keep if not all; hardest and easiest are chosen over the global batch (1.7x the time)."""
    ratio: float | None = Field(default=None, gt=0)
    """Negatives kept per matched pair; null keeps all."""
    warmup: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the run over which the ratio grows geometrically from 1 to its end value."""
    weight: float = Field(default=1.0, ge=0)
    """Factor on every kept negative."""
    seed: int = 0
    """Seed of the random choice, which also depends on samples_seen and on the pair's place in the global batch, but
    not on ranks."""

    @model_validator(mode="after")
    def _warmup_starts_below(self) -> NegativeSettings:
        if self.warmup and self.ratio is not None and self.ratio < 1:
            raise ValueError("warmup grows the ratio from 1: give a ratio of at least 1, or no warmup")
        return self

    def ratio_at(self, samples_seen: int, total_samples: int, global_batch: int) -> float | None:
        """Negatives per matched pair at this point of the run; None for all."""
        full = float(global_batch - 1)
        end = full if self.ratio is None else min(self.ratio, full)
        done = samples_seen / max(1, total_samples) / self.warmup if self.warmup else 1.0
        ratio = end if done >= 1 else max(end, 1.0) ** done
        return None if ratio >= full else ratio


def matched_samples(settings: NegativeSettings, samples: int, global_batch: int) -> int:
    """Number of samples at which a run has scored as many pairs as ``samples`` with all negatives (SigLIP's "matched
    pairs"), without warm-up."""
    ratio = settings.ratio_at(1, 1, global_batch)
    return samples if ratio is None else round(samples * global_batch / (1 + ratio))


class Choice:
    """The decision for one batch: a mask for each tile."""

    def __init__(self, settings: NegativeSettings, ratio: float | None, samples_seen: int, pairs: Pairs) -> None:
        self.settings, self.ratio, self.pairs = settings, ratio, pairs
        self.threshold: Tensor | None = None
        ring = pairs.ring
        self.starts = [sum(ring.rows[:rank]) for rank in range(ring.world)]
        self.salt = _mix(torch.tensor([settings.seed * 1_000_003 + samples_seen]))[0].item()

    def decide(self, excluded: Tensor | None, riders: list[Tensor]) -> None:
        """Sweeps for the threshold if there is one; ``excluded`` groups never count as negatives."""
        if self.ratio is None or self.settings.keep == "random":
            return
        wanted = torch.full((1,), round(self.ratio * self.pairs.ring.total_rows), device=self.pairs.image.device)
        sign = 1 if self.settings.keep == "hardest" else -1
        upper, wanted = self._select(wanted, sign, excluded, riders, None)
        lower, _ = self._select(wanted, sign, excluded, riders, upper)
        self.threshold = _value(upper * BINS + lower, sign)

    def _select(
        self, wanted: Tensor, sign: int, excluded: Tensor | None, riders: list[Tensor], upper: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The half-key in which the ``wanted``-th largest lies, and how many are still wanted inside it, [1] each.

        It stays on the device: reading a number would synchronise with every tile before it.
        """
        counts = torch.zeros(BINS + 1, dtype=torch.int64, device=wanted.device)  # the last bin: pairs that do not count
        one = torch.ones((), dtype=torch.int64, device=wanted.device)

        def visit(tile: Tile) -> None:
            keys = _key(tile.z, sign)
            half = keys >> 16 if upper is None else (keys & (BINS - 1)).masked_fill_((keys >> 16) != upper, BINS)
            if excluded is not None:
                half.masked_fill_(tile.same_group(excluded), BINS)
            tile.diagonal_of(half).fill_(BINS)
            counts.scatter_add_(0, half.view(-1), one.expand(half.numel()))

        self.pairs.sweep(visit, riders)
        reached = self.pairs.ring.add_up(counts)[:BINS].flip(0).cumsum(0)
        place = torch.searchsorted(reached, torch.minimum(wanted, reached[-1:]))
        before = reached[(place - 1).clamp(min=0)].masked_fill(place == 0, 0)
        return BINS - 1 - place.clamp(max=BINS - 1), wanted - before

    def mask(self, tile: Tile) -> Tensor | None:
        """[r, c] bool, True on negatives that stay; None when all do."""
        if self.ratio is None:
            return None
        if self.threshold is not None:
            return tile.z >= self.threshold if self.settings.keep == "hardest" else tile.z <= self.threshold
        device = self.pairs.image.device
        first = self.starts[self.pairs.ring.rank]
        images = torch.arange(first + tile.rows.start, first + tile.rows.stop, device=device)
        first = self.starts[tile.owner]
        texts = torch.arange(first + tile.columns.start, first + tile.columns.stop, device=device)
        bits = _mix(_mix(images ^ self.salt)[:, None] ^ _mix(texts + BINS * BINS // 2))
        return bits < int(self.ratio / max(1, self.pairs.ring.total_rows - 1) * 2**32)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash (the finaliser of MurmurHash3) of int64 values."""
    low = 2**32 - 1
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


def _key(z: Tensor, sign: int) -> Tensor:
    """float32 logits -> int64 in [0, 2^32) of the same order (reversed for sign -1)."""
    bits = (z.float() * sign).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits, bits + 2**31)


def _value(key: Tensor, sign: int) -> Tensor:
    """The float32 of a key."""
    bits = torch.where(key >= 2**31, key - 2**31, ~key)
    return bits.to(torch.int32).view(torch.float32) * sign
