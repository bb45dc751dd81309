"""What a step says of the model: how far matched pairs stand out, what is retrieved within the batch, whether the
embeddings collapse.

    result = train_step(..., sample=rows_per_rank(world))
    values = measure(result.sample, batch.groups)                 # {"logit_matched": 3.1, "image_to_text_r1": 0.4, ...}

Measured on at most SAMPLE pairs of the global batch (all of a smaller one), in float32, where a line is logged:

- ``logit_matched``, ``logit_other`` and their ``_std``: logits of matched pairs and of all others (SigLIP, arXiv
  2303.15343, figure 6); pairs of one caption are not "other"
- ``image_to_text_r1``, ``text_to_image_r1``: share whose partner is ahead of all other captions (images)
- ``cosine_other``, ``cosine_images``, ``cosine_texts``: mean cosine of unmatched pairs, of images, of captions; near
  1 the embeddings have collapsed to a point
- ``dims_images``, ``dims_texts``: effective number of dimensions (participation ratio of the covariance)
- ``repeated``: share of the global batch whose caption is also another pair's (false negatives)
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.core import collectives
from trainer.core.types import Embeddings

SAMPLE = 512


def rows_per_rank(world: int) -> int:
    """Rows of each rank's batch that are looked at."""
    return max(1, SAMPLE // world)


@torch.no_grad()
def measure(z: Embeddings, groups: Tensor) -> dict[str, float]:
    """A collective: ``z`` has the first rows of this rank's batch, ``groups`` [b] those of all of it; the same values
    on all ranks. Empty for a single pair."""
    device = z.image.device
    stacked = collectives.stack_over_ranks(groups.to(device))
    both = collectives.stack_over_ranks(torch.cat([z.image, z.text], dim=1).float()).flatten(0, 1)
    image, text = both.chunk(2, dim=1)
    if len(image) < 2:
        return {}
    with torch.autocast(device.type, enabled=False):
        values = _pairs(image, text, stacked[:, : len(z.image)].flatten(), z.scale.float(), z.bias.float())
        for name, side in (("images", image), ("texts", text)):
            values[f"cosine_{name}"] = _mean_cosine(side)
            values[f"dims_{name}"] = _dimensions(side)
    values["repeated"] = _repeated(stacked.flatten())
    numbers = torch.stack([value.reshape(()).double() for value in values.values()]).tolist()
    return {name: float(f"{number:.5g}") for name, number in zip(values, numbers, strict=True)}


def sample_of(z: Embeddings, rows: int) -> Embeddings:
    """A copy of the first ``rows`` of z, without its graph."""
    image, text, scale, bias = (x.detach()[:rows].clone() for x in z[:4])
    return Embeddings(image, text, scale, bias)


def _pairs(image: Tensor, text: Tensor, groups: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Logits of matched and other pairs, and who is retrieved first; ``groups`` [n] of the rows."""
    cosines = image @ text.t()
    matched = cosines.diagonal()
    same = groups[:, None] == groups
    same = same & ~same.all() | torch.eye(len(same), dtype=torch.bool, device=same.device)
    others = (~same).sum()
    rivals = cosines.masked_fill(same, -2.0)
    mean = cosines.masked_fill(same, 0.0).sum() / others
    spread = ((cosines - mean).square().masked_fill(same, 0.0).sum() / others).sqrt()
    return {
        "logit_matched": matched.mean() * scale + bias,
        "logit_matched_std": matched.std(correction=0) * scale,
        "logit_other": mean * scale + bias,
        "logit_other_std": spread * scale,
        "image_to_text_r1": (matched > rivals.amax(1)).double().mean(),
        "text_to_image_r1": (matched > rivals.amax(0)).double().mean(),
        "cosine_other": mean,
    }


def _mean_cosine(x: Tensor) -> Tensor:
    """Of all pairs of different rows of x [n, d], which have length 1."""
    return (x.sum(0).square().sum() - len(x)) / (len(x) * (len(x) - 1))


def _dimensions(x: Tensor) -> Tensor:
    """(sum of eigenvalues)² / sum of squared eigenvalues of the covariance of x [n, d]; 0 where all rows are equal."""
    gram = (x - x.mean(0)) @ (x - x.mean(0)).t()
    return gram.diagonal().sum().square() / gram.square().sum().clamp(min=1e-30)


def _repeated(groups: Tensor) -> Tensor:
    """Share of groups [B] that occur more than once, without a synchronisation."""
    ordered = groups.sort().values
    twice = ordered[1:] == ordered[:-1]
    apart = torch.zeros(1, dtype=torch.bool, device=groups.device)
    return (torch.cat([apart, twice]) | torch.cat([twice, apart])).double().mean()
