"""The bias of a sigmoid loss for another batch than the model was trained at.

A SigLIP of a batch of 32,768 has a bias near -16: right where each pair meets 32,767 negatives. In a batch of 256 there
are 128 times fewer, the best bias is some 5 higher, and until the bias has moved there the towers are pushed to raise
every cosine: that, and not the new pairs, is what they learn first. Ranking does not depend on the bias.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_tools.io.permutation import Permutation
from trainer.core import distributed
from trainer.data.open import open_source
from trainer.data.settings import DataSettings, SourceSettings
from trainer.data.transforms import Damaged, decode, fit
from trainer.models import DualEncoder

PAIRS, AT_ONCE = 512, 64
REACH = 50.0


@torch.no_grad()
def calibrated_bias(model: DualEncoder, shards: str, batch: int) -> float:
    """The bias at which the sigmoid loss of ``model`` on batches of ``batch`` pairs is least, towers and scale as they
    are: there what positives and negatives pull at it is equal."""
    settings = DataSettings(train=shards)
    source = open_source(SourceSettings(path=shards), settings)
    pictures, texts = [], []
    for sample in np.sort(Permutation(source.size, key=1)(np.arange(min(PAIRS, source.size)))).tolist():
        try:
            raw = source.read(sample)
            pictures.append(fit(decode(raw.image, settings.max_pixels), model.preprocess))
        except Damaged:
            continue
        texts.append(raw.captions[0])
    tokens, mask = model.preprocess.tokenize(texts)
    device = distributed.device()
    model = model.to(device).eval()
    image = torch.cat(
        [model.embed_images(torch.stack(pictures[at : at + AT_ONCE]).to(device)) for at in _starts(texts)]
    )
    text = torch.cat(
        [
            model.embed_texts(tokens[at : at + AT_ONCE].to(device), mask[at : at + AT_ONCE].to(device))
            for at in _starts(texts)
        ]
    )
    return solve(model.head()[0].double() * image.double() @ text.double().T, batch)


def _starts(rows: list[str]) -> range:
    return range(0, len(rows), AT_ONCE)


def solve(logits: Tensor, batch: int) -> float:
    """The bias for logits [n, n] without one, matched pairs on the diagonal, that stand for batches of ``batch`` pairs:
    the root of mean(sigmoid of negatives) (batch - 1) = mean(sigmoid of minus positives), which falls monotonically."""
    positive, others = logits.diagonal(), ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    negative = logits[others]
    low, high = -REACH - float(logits.max()), REACH - float(logits.min())
    for _ in range(60):
        bias = (low + high) / 2
        pull = (batch - 1) * torch.sigmoid(negative + bias).mean() - torch.sigmoid(-positive - bias).mean()
        low, high = (low, bias) if pull > 0 else (bias, high)
    return (low + high) / 2
