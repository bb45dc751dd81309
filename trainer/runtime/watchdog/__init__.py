"""If a rank dies, ends the job on all ranks, with one line that says which rank, where, at which step and why.

    with Watchdog(heartbeat_timeout=20, timeout=600) as watch:
        watch.doing("reading data", step)          # cheap: it only sets two fields
        ...

Every rank has a connection to rank 0 and reports its activity twice a second. When a process dies, the operating system
closes its connection, and rank 0 knows at once. When a machine or a whole process hangs, rank 0 notices after
``heartbeat_timeout`` seconds of silence. A rank that fails with an exception sends its message. Rank 0 collects related
failures for a moment (a dead rank makes its neighbours fail too), picks the cause, prints the line and tells the
others, which exit wherever they are: in a collective, waiting for data, writing a checkpoint. If rank 0 itself is gone,
every rank notices, and rank 1 prints the line (if a whole machine is lost, the first rank of each machine does).

A rank that is alive but stuck makes the others wait: NCCL does not report it, and aborts all ranks after its timeout.
Rank 0 acts earlier: if no rank has progressed for ``timeout`` seconds (run.timeout) and they are not all at the same
point, it names the one that is furthest behind.

All this runs in threads, without collectives, so that it works while the main thread hangs in a collective.
"""

from trainer.runtime.watchdog.client import Watchdog

__all__ = ["Watchdog"]
