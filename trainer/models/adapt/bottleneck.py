"""A token embedding through a bottleneck, for the large vocabularies of multilingual tokenizers (mSigLIP, arXiv
2303.15343, 3.5).

    model: {config: {...}, tokenizer: google/mt5-base, token_bottleneck: 96}

V x K and K x W parameters replace V x W: 24 M instead of 192 M for 250,000 tokens, a width of 768 and K = 96, with as
much less memory for gradients and moments. On export the two are multiplied, so that plain transformers loads the
model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.core.types import UserError


class BottleneckEmbedding(nn.Module):
    """Tokens [b, n] int64 -> [b, n, W], through K numbers per token."""

    def __init__(self, vocabulary: int, narrow: int, width: int, std: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, narrow)
        self.widen = nn.Linear(narrow, width, bias=False)
        # Their product has the initial standard deviation that a table of V x W would have.
        nn.init.normal_(self.tokens.weight, std=std)
        nn.init.normal_(self.widen.weight, std=narrow**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, n, W]"""
        return self.widen(self.tokens(tokens))


def narrow_embedding(towers: PreTrainedModel, narrow: int) -> None:
    """Replaces the text tower's new token embedding by one with a bottleneck of ``narrow`` numbers."""
    text: Any = towers.get_submodule("text_model")
    table = text.get_input_embeddings()
    vocabulary, width = table.weight.shape
    if narrow >= width:
        raise UserError(
            f"model.token_bottleneck is {narrow}, but the text tower is {width} wide: choose less, or remove it"
        )
    std = 0.02 if table.weight.is_meta else table.weight.detach().std().item()
    text.set_input_embeddings(BottleneckEmbedding(vocabulary, narrow, width, std))


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's weights with the product of the two factors, under the name of a plain token embedding."""
    plain = dict(weights)
    for name in weights:
        if name.endswith(".tokens.weight"):
            prefix = name.removesuffix("tokens.weight")
            plain[f"{prefix}weight"] = plain.pop(name).float() @ plain.pop(f"{prefix}widen.weight").float().T
    return plain
