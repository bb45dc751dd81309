"""How far a step moves the weights, relative to their size: some elements of every trained tensor, before and after.

motion = Motion(ds_engine, tower_of)
before = motion.weights()
engine.step()
motion.ratios(before)                                  # {"image": 0.0011, "text": 0.0008}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.core.distributed import device, world_size
from trainer.engine.fragments import Fragment, fragments
from trainer.engine.state_names import WEIGHT

ELEMENTS = 1024
"""Of each tensor, evenly spaced; a root mean square of them is good to a few percent."""


class Motion:
    """The trained tensors of each part that ``part_of(name)`` names; a part without any is left out."""

    def __init__(self, ds_engine: Any, part_of: Callable[[str], str | None]) -> None:
        self.parts: dict[str, list[tuple[Fragment, int]]] = {}
        for fragment in fragments(ds_engine):
            part = part_of(fragment.name)
            if part is not None and fragment.parameter.requires_grad:
                mine = self.parts.setdefault(part, [])
                if fragment.owned and fragment.length:
                    mine.append((fragment, -(-fragment.length // ELEMENTS)))

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """Copies of the elements, by part, in order."""
        none = torch.zeros(0, device=device())
        return {
            part: torch.cat([none, *(piece.read(WEIGHT)[::step].to(device(), torch.float32) for piece, step in pieces)])
            for part, pieces in self.parts.items()
        }

    @torch.no_grad()
    def ratios(self, before: dict[str, Tensor]) -> dict[str, float]:
        """A collective: the norm of what each part has moved by since ``before``, over the norm of its weights."""
        squares = []
        for part, now in self.weights().items():
            stands_for = [torch.full((-(-piece.length // step),), float(step)) for piece, step in self.parts[part]]
            weight = torch.cat([torch.zeros(0), *stands_for]).to(now.device)
            squares += [((now - before[part]).square() * weight).sum(), (before[part].square() * weight).sum()]
        if not squares:
            return {}
        total = torch.stack(squares).double()
        if world_size() > 1:
            dist.all_reduce(total)
        moved, size = total.view(-1, 2).sqrt().t().tolist()
        return {part: a / b if b else 0.0 for part, a, b in zip(self.parts, moved, size, strict=True)}
