"""Small collectives: a vote, a mean, a stack, and one rank's answer for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from trainer.core.distributed import device, is_main, world_size
from trainer.core.types import PeerLost, RunFailed, UserError


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """True on all ranks if ``flag`` is true on any: how ranks agree on out-of-memory, a signal or a bad gradient."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([float(flag)], device=device())
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def stack_over_ranks(mine: torch.Tensor) -> torch.Tensor:
    """[world, *mine.shape]: the tensors of all ranks, of equal shape and dtype, in rank order."""
    if world_size() == 1:
        return mine[None]
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone)


def mean_over_ranks(values: list[float]) -> list[float]:
    """Averages of a few numbers for the log."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return (total / world_size()).tolist()


def on_main(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """Calls ``work`` on rank 0 and returns its result on every rank. Its UserError, or its OSError as a RunFailed, is
    raised on every rank, so that none waits for rank 0. After any other exception rank 0 raises it and the others raise
    PeerLost.
    """
    answer: dict[str, Any] = {}
    bug: Exception | None = None
    if is_main():
        try:
            answer["value"] = work() or {}
        except (UserError, OSError) as error:
            answer["error"], answer["again"] = str(error), isinstance(error, OSError | RunFailed)
        except Exception as error:
            answer["bug"], bug = f"{type(error).__name__}: {error}", error
    answer = share(answer)
    if bug is not None:
        raise bug
    if "bug" in answer:
        raise PeerLost(f"rank 0 failed: {answer['bug']}")
    if "error" in answer:
        raise RunFailed(answer["error"]) if answer["again"] else UserError(answer["error"])
    return answer["value"]


def share(value: dict[str, Any]) -> dict[str, Any]:
    """Sends rank 0's dict to every rank, as JSON."""
    if world_size() == 1:
        return value
    text = json.dumps(value).encode() if is_main() else b""
    size = torch.tensor([len(text)], device=device())
    dist.broadcast(size, src=0)
    data = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8).to(device())
    dist.broadcast(data, src=0)
    return json.loads(data.cpu().numpy().tobytes())
