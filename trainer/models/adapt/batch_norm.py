"""Convolutional towers such as ALIGN's EfficientNet (arXiv 2102.05918): batch normalisation keeps its pretrained
statistics.

    model:
      image: {path: google/efficientnet-b0}
      text: {path: google-bert/bert-base-uncased}

With batch statistics an embedding would depend on the other images of its micro-batch and rank: the second pass of a
step would not repeat the first, and the micro-batch would change what is learned. With fixed statistics every image
is embedded independently, and the step is exact. The layers' scale and shift are trained.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.core.types import UserError


def fixed_batch_norms(towers: nn.Module, pretrained: bool) -> list[nn.Module]:
    """The layers that stay in evaluation mode. Raises UserError for a new tower, whose layers have no statistics."""
    layers: list[nn.Module] = [module for module in towers.modules() if isinstance(module, _BatchNorm)]
    if layers and not pretrained:
        raise UserError(
            "model.image.config: a new tower with batch normalisation has no statistics to keep, and those of a "
            "micro-batch would make the gradient depend on it: start from a pretrained one (model.image.path), or "
            "from one with layer norms (convnext, vit)"
        )
    return layers
