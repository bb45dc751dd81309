"""A rank that is gone ends the job everywhere, with one line that says which rank, where, at which step and why.

    with Watchdog(heartbeat_timeout=20, timeout=600) as watch:
        watch.doing("reading data", step)          # as often as you like: it only sets two fields
        ...

Every rank keeps a connection to rank 0 and says twice a second where it is. When a process dies, its system closes the
connection: rank 0 knows at once. When a machine or a whole process stops, nothing is heard for ``heartbeat_timeout``
seconds. A rank that fails by an exception says so in its last words. Rank 0 waits a moment for what belongs together (a
dead rank makes its neighbours fail as well), picks the cause, prints the line and tells the others, which exit wherever
they are: in a collective, waiting for data, writing a checkpoint. When rank 0 itself is gone every rank sees it, and
rank 1 prints the line (with a whole machine lost, the first rank of each machine).

A rank that is alive and does not get on makes the others wait: NCCL does not tell them, and aborts them all when its
timeout has passed. Rank 0 is there before: when no rank has moved for ``timeout`` seconds (run.timeout) and they are
not all at the same place, it names the one that has come least far.

Threads and not collectives do this, so that it works while the main thread hangs in one.
"""

from trainer.runtime.watchdog.client import Watchdog

__all__ = ["Watchdog"]
