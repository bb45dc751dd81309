"""Tie-aware ranks and recall@k: the only place that turns scores into hits.

Answers with equal float32 scores count as randomly ordered: a query contributes its *probability* of having a right
answer among the first k, computed exactly. A collapsed model, whose scores are all equal, therefore scores at chance,
not 100% (as with `argmax`) or 0%; two copies of one image share its hit. A NaN score never wins.
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
        """[q] float64: the probability that a right answer is among the first ``k`` if ties are broken at random."""
        places = k - self.better
        miss = torch.ones_like(places, dtype=torch.float64)
        for taken in range(k):
            # One more of the places that tied answers compete for goes to a wrong one.
            share = (self.level - taken).clamp(min=0).double() / (self.level + self.right - taken).clamp(min=1).double()
            miss = torch.where(taken < places, miss * share, miss)
        return 1.0 - miss

    def recall(self, k: int) -> float:
        """The mean of ``hits`` over the queries, in [0, 1]."""
        return self.hits(k).mean().item()

    def standard_error(self, k: int) -> float:
        """The standard error of ``recall``, with the queries as a random sample."""
        hits = self.hits(k)
        return (hits.var(correction=0) / len(hits)).sqrt().item()


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """[n, d] x [m, d] -> [n, m] float32 inner products, summed in float64.

    The last bit of a float32 product depends on the position of the row in the matrix; rounded from float64, equal rows
    give equal scores in any tiling, so that ties are found.
    """
    return (a.double() @ b.double().T).float()


def own_score(a: Tensor, b: Tensor) -> Tensor:
    """[n, d] x [n, d] -> [n] float32, rounded as in ``similarity``; NaN becomes the lowest score."""
    return (a.double() * b.double()).sum(-1).float().nan_to_num(nan=-torch.inf)
