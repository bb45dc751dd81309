"""Progress of ``shard``: rows of all workers, bytes read, and rows left out."""

from __future__ import annotations

import time
from collections import Counter

from data_tools.io.formatting import human_bytes
from data_tools.io.progress import Progress
from data_tools.sharding.counts import Tally

EXAMPLES = 1000


class ShardProgress(Progress):
    """Adds up the reports of all workers and shows them."""

    def __init__(self, total: int, done: int, quiet: bool = False) -> None:
        super().__init__(total, done, "rows", "images", quiet)
        self.bytes = 0
        self.rejected: Counter[str] = Counter()
        self.examples: list[dict[str, str]] = []
        """The first rows that were left out."""

    def add_tally(self, tally: Tally) -> None:
        """Adds a worker's report."""
        self.bytes += tally.bytes
        self.rejected += tally.rejected
        self.examples += tally.examples[: EXAMPLES - len(self.examples)]
        self.add(tally.images + tally.rejected.total())

    def details(self) -> list[str]:
        """Bytes read per second since the run began, and the most common reasons for rejects."""
        parts = [f"{human_bytes(self.bytes / max(time.monotonic() - self.started, 1e-3))}/s"]
        if self.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.most_common(4))
            parts.append(f"left out {self.rejected.total():,} ({reasons})")
        return parts
