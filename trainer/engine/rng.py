"""Randomness without a state to save."""

from __future__ import annotations

import random

import numpy as np
import torch
import xxhash


def seed_step(seed: int, samples_seen: int, rank: int) -> None:
    """Seeds torch (CPU and GPUs), numpy and python for one step: dropout and masks become a function of (seed, samples_seen, rank).

    Call it before each step with the position before that step. A resumed run then draws what the uninterrupted one drew, with nothing
    saved and nothing to go stale. Each rank draws for its own rows, so with another number of ranks the draws differ (equally distributed):
    recipes without dropout and patch masking keep the same curve there too.
    """
    mixed = xxhash.xxh3_64_intdigest(f"{seed}/{samples_seen}/{rank}".encode())
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
