"""What building an engine promises beyond the numbers: nobody is told what only DeepSpeed's authors can change."""

from __future__ import annotations

import importlib
import warnings

import torch
import torch.distributed as dist

from tests.support.forked_ranks import run_ranks
from trainer.engine import engine


def heard(quiet: bool) -> list[str]:
    """Warnings of the calls that DeepSpeed makes, and one of somebody else."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if quiet:
            importlib.reload(engine)  # pytest has put the filters away that were set when it was imported
        dist.all_gather_into_tensor(torch.zeros(4), torch.ones(2))
        dist.reduce_scatter_tensor(torch.zeros(2), torch.ones(4))
        warnings.warn("another", FutureWarning, stacklevel=1)
    return [str(warning.message) for warning in found]


def test_old_names_in_deepspeed_are_not_the_users_business_and_other_warnings_are() -> None:
    loud, quiet = (run_ranks(heard, 2, how)[0] for how in (False, True))
    assert quiet == ["another"]
    assert "another" in loud  # and whatever this torch says of those names
