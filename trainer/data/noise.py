"""Spoils a share of the training pairs on purpose: how robust is a loss? (SigLIP, arXiv 2303.15343, figure 7)

    data: {noise: {image: 0.2, text: 0.2, pairing: 0.2}}

What is spoiled, and how, depends on (seed, sample position) and on the global batch that it is in: never on ranks,
workers, chunks or caches, nor on where a run was interrupted.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_tools.io.permutation import Ints, Permutation, scramble
from trainer.core.types import Preprocess, UserError
from trainer.data.order import derive_key, uniforms
from trainer.data.patches import grid_of, grid_size
from trainer.data.settings import NoiseSettings


class Noise:
    """Which pairs of the run are spoiled, and with what. Global batches begin at ``start`` and have ``batch_size``
    pairs."""

    def __init__(self, settings: NoiseSettings, preprocess: Preprocess, seed: int, batch_size: int, start: int) -> None:
        self.settings, self.preprocess, self.seed = settings, preprocess, seed
        self.batch_size, self.offset = batch_size, start % batch_size
        self.tokenize_noise = getattr(preprocess.tokenize, "noise", None)
        stored = preprocess.precomputed.side if preprocess.precomputed else None
        for side in ("image", "text"):
            if stored == side and getattr(settings, side):
                raise UserError(
                    f"data.noise.{side}: the {side} tower does not run where its embeddings are stored; set it to 0, "
                    "or remove model.precomputed"
                )
        if settings.text and self.tokenize_noise is None:
            raise UserError("data.noise.text: this model's tokenizer has no `noise` (trainer/models/preprocess.py)")
        self._partners = lru_cache(maxsize=2)(self._trade)

    @property
    def active(self) -> bool:
        """Whether any pair is spoiled."""
        return self.settings.image > 0 or self.settings.text > 0 or self.settings.pairing > 0

    def noisy(self, side: str, positions: Ints) -> NDArray[np.bool_]:
        """[b] whether the image ("image") or caption ("text") at each position is replaced."""
        return uniforms(derive_key(self.seed, "noise", side), positions, 1)[:, 0] < getattr(self.settings, side)

    def partners(self, positions: Ints) -> Ints:
        """[b] the position whose caption each gets: its own, or another of the same global batch."""
        if not self.settings.pairing:
            return positions
        firsts = (positions - self.offset) // self.batch_size * self.batch_size + self.offset
        found = np.empty_like(positions)
        for first in np.unique(firsts).tolist():
            mask = firsts == first
            found[mask] = self._partners(first)[positions[mask] - first] + first
        return found

    def _trade(self, first: int) -> Ints:
        """[batch_size] row whose caption each row of the batch at ``first`` gets. An even number of random rows pass
        theirs on in a circle, so that none of them keeps its own, and the share is right on average in small batches
        too."""
        key = derive_key(self.seed, "noise", "pairing", first)
        rows = np.arange(self.batch_size)
        luck = uniforms(key, np.zeros(1, np.int64), 1)[0, 0]
        count = min(2 * int(self.settings.pairing * self.batch_size / 2 + luck), self.batch_size)
        chosen = Permutation(self.batch_size, key)(rows)[:count]
        rows[chosen] = np.roll(chosen, -1)
        return rows

    def image(self, position: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Uniform noise in the shape of ``pixels`` [3, h, w]; a strip of patches keeps its grid and padding."""
        words = -(-pixels.size // 8)
        counter = np.arange(words, dtype=np.uint64) + np.uint64(derive_key(self.seed, "noise pixels", position))
        made = scramble(scramble(counter)).astype("<u8").view(np.uint8)[: pixels.size].reshape(pixels.shape)
        if self.preprocess.resize == "patches":
            patch, budget = grid_of(self.preprocess)
            rows, columns = grid_size(pixels, patch, budget)
            made[:, :, rows * columns * patch :] = pixels[:, :, rows * columns * patch :]
        return made

    def captions(self, positions: Ints) -> tuple[NDArray[np.int64], NDArray[np.bool_], Ints]:
        """Tokens [b, n] and mask [b, n] of random captions, and groups [b] of their own."""
        draws = uniforms(derive_key(self.seed, "noise tokens"), positions, 1 + self.preprocess.num_tokens)
        assert self.tokenize_noise is not None
        tokens, mask = self.tokenize_noise(draws)
        groups = scramble(positions.astype(np.uint64) + np.uint64(derive_key(self.seed, "noise groups")))
        return tokens.numpy(), mask.numpy(), groups.astype(np.int64)

    def counts(self, first: int) -> dict[str, int]:
        """How many images, captions and pairings of the global batch at ``first`` are spoiled."""
        positions = np.arange(first, first + self.batch_size)
        return {
            "image": int(self.noisy("image", positions).sum()),
            "text": int(self.noisy("text", positions).sum()),
            "pairing": int((self.partners(positions) != positions).sum()),
        }
