"""Where the right answers of a query stand among the wrong ones: the one place that turns scores into hits.

A tie is not a win. Answers whose scores agree in float32 are put in a random order, and a query counts with its
*chance* of having a right answer among the first k: the mean over all orders, computed exactly. A collapsed model,
whose scores are all equal, therefore gets chance and not 100% (as `argmax` would give it) and not 0%; two copies of one
picture share what one would have won. A score that is not a number never wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Standing(NamedTuple):
    """Of q queries, all [q] int64: ``better``, wrong answers that score above the best right one; ``level``, wrong
    answers that score the same; ``right``, right answers that have that best score (at least 1).
    """

    better: Tensor
    level: Tensor
    right: Tensor

    def hits(self, k: int) -> Tensor:
        """[q] float64: the chance that a right answer is among the first ``k`` when ties are broken at random."""
        places = k - self.better
        miss = torch.ones_like(places, dtype=torch.float64)
        for taken in range(k):
            # One more of the places that the level answers compete for goes to a wrong one.
            share = (self.level - taken).clamp(min=0).double() / (self.level + self.right - taken).clamp(min=1).double()
            miss = torch.where(taken < places, miss * share, miss)
        return 1.0 - miss

    def recall(self, k: int) -> float:
        """The mean of ``hits`` over the queries, in [0, 1]."""
        return self.hits(k).mean().item()

    def standard_error(self, k: int) -> float:
        """Of ``recall``, were these queries drawn from many more."""
        hits = self.hits(k)
        return (hits.var(correction=0) / len(hits)).sqrt().item()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """[n, d] x [m, d] -> [n, m] float32 inner products, summed in float64.

    A float32 product depends in its last bit on where in the matrix a row stands; rounded from float64 equal rows give
    equal scores in any tiling, so that ties are seen.
    """
    return (a.double() @ b.double().T).float()


def own_score(a: Tensor, b: Tensor) -> Tensor:
    """[n, d] x [n, d] -> [n] float32, as ``similarity`` rounds it; what is not a number loses to everything."""
    return (a.double() * b.double()).sum(-1).float().nan_to_num(nan=-torch.inf)
