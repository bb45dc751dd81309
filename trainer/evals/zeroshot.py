"""Zero-shot classification: the class whose prompts lie nearest to the picture (CLIP, arXiv 2103.00020, section 3.1).

A class is the normalised mean of the embeddings of its prompts (the ensemble of templates). Classes may differ from picture to
picture, where templates speak of what else is known of it: "{character}, {face}" asks which face it is, the character being known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.evals.standing import Standing

DEPTHS = (1, 5)


def ensemble(prompts: Tensor) -> Tensor:
    """[..., templates, d] L2-normalised -> [..., d]: the normalised mean."""
    return normalize(prompts.float().mean(-2), dim=-1)


def classify(image: Tensor, classes: Tensor, right: Tensor, *, rows: int = 1024) -> Standing:
    """Where the right class of each picture stands.

    ``image`` [n, d]; ``classes`` [c, d], or [n, c, d] where each picture has its own; ``right`` [n, c] bool, at least one each (several
    where several names are true of a picture: the first of them counts).
    """
    assert right.any(1).all(), "a picture without a right class"
    parts = []
    for start in range(0, image.shape[0], rows):
        part = slice(start, min(start + rows, image.shape[0]))
        shared = classes.double() if classes.dim() == 2 else classes[part].double()
        scores = torch.einsum("nd,cd->nc" if classes.dim() == 2 else "nd,ncd->nc", image[part].double(), shared).float()
        true = right[part]
        own = scores.nan_to_num(nan=-torch.inf).masked_fill(~true, -torch.inf).amax(1, keepdim=True)
        wrong = scores.nan_to_num(nan=torch.inf)
        level = (wrong == own) & ~true
        best = (scores.nan_to_num(nan=-torch.inf) == own) & true
        parts.append(Standing(((wrong > own) & ~true).sum(1), level.sum(1), best.sum(1)))
    return Standing(*(torch.cat(field) for field in zip(*parts, strict=True)))


def accuracies(standing: Standing) -> dict[str, float]:
    """Top-1 and top-5 share, each in [0, 1]."""
    return {f"top{k}": standing.recall(k) for k in DEPTHS}


def per_class(standing: Standing, label: Tensor, names: list[str]) -> dict[str, float]:
    """Top-1 share of the pictures of each class that has any; ``label`` [n] int64 is the class each was filed under."""
    hits = standing.hits(1)
    wins = torch.zeros(len(names), dtype=torch.float64, device=hits.device).index_add_(0, label, hits)
    seen = torch.bincount(label, minlength=len(names))
    return {name: (wins[i] / seen[i]).item() for i, name in enumerate(names) if seen[i] > 0}
