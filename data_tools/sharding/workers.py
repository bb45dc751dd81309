"""Writes the shards of a plan in several processes. A shard depends on the plan only, so any worker may write any
shard.

Workers check that their parent is alive when they report, a few times a second, so a killed run stops writing.
"""

from __future__ import annotations

from collections.abc import Callable

from data_tools.io.output import Output
from data_tools.io.workers import Send, run_workers
from data_tools.sharding.counts import Reporter, Tally
from data_tools.sharding.plan import ShardPlan
from data_tools.sharding.write_shard import write_shard


def write_shards(
    plan: ShardPlan, output: Output, shards: list[int], processes: int, strict: bool, on_tally: Callable[[Tally], None]
) -> None:
    """Writes all ``shards``. ``on_tally`` receives the counts and may raise to end the run, which drops unfinished
    shards.

    Raises UserError at the first reject if ``strict``, and what ``run_workers`` raises.
    """

    def work(shard: int, send: Send) -> None:
        write_shard(plan, output, shard, Reporter(send), strict)

    for _ in run_workers(work, shards, processes, on_tally):
        pass
