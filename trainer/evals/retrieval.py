"""Image-text retrieval: recall at 1, 5 and 10 in both directions, with any number of captions for each image.

    metrics = recalls(*standings(image, text, owner))       # {"image_to_text_r1": 0.78, ...}

The convention of Flickr30k and COCO (Karpathy and Fei-Fei, arXiv 1412.2306): an image is right when *one* of its
captions is among the first k of all captions; a caption is right when its image is among the first k of all images.
Scores are made in tiles, once for both directions; nothing of size n x m is kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.evals.ranking import Standing, own_score, similarity

DEPTHS = (1, 5, 10)


def standings(
    image: Tensor, text: Tensor, owner: Tensor, *, tile: int = 1024, rank: int = 0, world: int = 1
) -> tuple[Standing, Standing]:
    """(of images among captions, of captions among images).

    ``image`` [n, d] and ``text`` [m, d] are L2-normalised, ``owner`` [m] int64 is the image of each caption; every
    image needs a caption. With ``world`` > 1 all ranks pass the same tensors and get the same answer, each having
    scored its share of the images. Memory: about 20 tile^2 + O(n + m) bytes.
    """
    n, m = image.shape[0], text.shape[0]
    captions = torch.zeros(n, dtype=torch.int64, device=image.device).index_add_(0, owner, torch.ones_like(owner))
    if (captions == 0).any():
        raise ValueError(f"image {int((captions == 0).nonzero()[0])} has no caption: retrieval needs at least one each")
    of_text = torch.cat([own_score(text[at : at + tile], image[owner[at : at + tile]]) for at in range(0, m, tile)])
    of_image = torch.full((n,), -torch.inf, device=image.device).scatter_reduce_(0, owner, of_text, "amax")
    right = torch.zeros_like(captions).index_add_(0, owner, (of_text == of_image[owner]).long())

    # Rows of one matrix, so that ranks exchange once: better and level of the images, then of the captions.
    counts = torch.zeros(2, n + m, dtype=torch.int64, device=image.device)
    share = -(-n // world)
    for row in range(share * rank, min(share * (rank + 1), n), tile):
        rows = slice(row, min(row + tile, share * (rank + 1), n))
        for column in range(0, m, tile):
            columns = slice(column, min(column + tile, m))
            scores = similarity(image[rows], text[columns])
            wrong = owner[columns][None, :] != torch.arange(rows.start, rows.stop, device=owner.device)[:, None]
            for own, axis, span in (
                (of_image[rows, None], 1, rows),
                (of_text[None, columns], 0, slice(n + columns.start, n + columns.stop)),
            ):
                # "Not below or level" counts a score that is not a number as better: it is never the query's gain.
                counts[0, span] += ((scores <= own).logical_not_() & wrong).sum(axis)
                counts[1, span] += ((scores == own) & wrong).sum(axis)
    if world > 1:
        dist.all_reduce(counts)
    better, level = counts
    return Standing(better[:n], level[:n], right), Standing(better[n:], level[n:], torch.ones_like(better[n:]))


def recalls(of_image: Standing, of_text: Standing) -> dict[str, float]:
    """The metrics by name, each in [0, 1]."""
    table = {f"image_to_text_r{k}": of_image.recall(k) for k in DEPTHS}
    return table | {f"text_to_image_r{k}": of_text.recall(k) for k in DEPTHS}


def best(queries: Tensor, answers: Tensor, k: int, *, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """(scores [q, k] float32, indices [q, k]) of the k best answers to each query, by tiles of the answers; of equals
    the first."""
    scores = torch.empty(queries.shape[0], 0, device=queries.device)
    indices = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=queries.device)
    for start in range(0, answers.shape[0], tile):
        fresh = similarity(queries, answers[start : start + tile]).nan_to_num(nan=-torch.inf)
        places = torch.arange(start, start + fresh.shape[1], device=queries.device).expand_as(fresh)
        scores, indices = torch.cat([scores, fresh], 1), torch.cat([indices, places], 1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        scores, indices = scores.gather(1, order), indices.gather(1, order)
    return scores, indices
