"""Repeatable random numbers: a seed for each step, and snapshots of the generators within a step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor


def seed_step(seed: int, samples_seen: int, rank: int) -> None:
    """Seeds torch (CPU and GPUs), numpy and python for one step: dropout and masks become a function of (seed,
    samples_seen, rank).

    Call it before each step with the ``samples_seen`` before that step. A resumed run then draws the same numbers as an
    uninterrupted one, without saved generator states. Each rank draws for its own rows, so another number of ranks
    draws different numbers of the same distribution; recipes without dropout and patch masking keep the same curve.
    """
    mixed = xxhash.xxh3_64_intdigest(f"{seed}/{samples_seen}/{rank}".encode())
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that a forward pass on ``device`` uses."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def take(device: torch.device, previous: RandomState | None = None) -> RandomState:
        """The current state; ``previous`` itself if nothing was drawn since (a state is 5 kB, and there is one per
        micro-batch)."""
        state = RandomState(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)
        return previous if previous is not None and state.same_as(previous) else state

    def same_as(self, other: RandomState) -> bool:
        """Whether both states are equal."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.cuda is None or (other.cuda is not None and torch.equal(self.cuda, other.cuda))

    def restore(self, device: torch.device) -> None:
        """Restores the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
