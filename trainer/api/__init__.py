"""RingLIP's Python API: ``import ringlip``. The import is cheap; each name is loaded on first use.

    ringlip.train("recipe.yaml", {"optim.lr": 1e-3})         a run, in this process, on one rank or under any launcher
    ringlip.SigLipLoss(), ringlip.ClipLoss()                 the losses with open_clip's signatures, for your own loop
    ringlip.two_pass(model, batch, loss, micro_batch=64)     a step with a micro-batch's memory, for your own loop
    ringlip.dataset("shards/train", preprocess, 4096)        the data loader as a torch IterableDataset
    ringlip.plan("recipe.yaml", "24GiB", gpus=8)             forecast of memory per GPU, also for your own module

Runnable examples are in tests/examples/: open_clip_loop, hf_trainer, fabric, accelerate_loop, ddp, fsdp2, two_pass,
dataset, plan, train.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer import __version__

if TYPE_CHECKING:
    from trainer.api.planning import plan
    from trainer.api.training import TrainResult, train
    from trainer.core.types import Batch, Preprocess, UserError
    from trainer.data.dataset import ShardDataset, dataset
    from trainer.losses.drop_in import ClipLoss, SigLipLoss
    from trainer.models.preprocess import preprocess
    from trainer.two_pass import two_pass

__all__ = [
    "Batch",
    "ClipLoss",
    "Preprocess",
    "ShardDataset",
    "SigLipLoss",
    "TrainResult",
    "UserError",
    "__version__",
    "dataset",
    "plan",
    "preprocess",
    "train",
    "two_pass",
]

_HOME = {
    "Batch": "trainer.core.types",
    "ClipLoss": "trainer.losses.drop_in",
    "Preprocess": "trainer.core.types",
    "ShardDataset": "trainer.data.dataset",
    "SigLipLoss": "trainer.losses.drop_in",
    "TrainResult": "trainer.api.training",
    "UserError": "trainer.core.types",
    "dataset": "trainer.data.dataset",
    "plan": "trainer.api.planning",
    "preprocess": "trainer.models.preprocess",
    "train": "trainer.api.training",
    "two_pass": "trainer.two_pass",
}
"""Name -> the module that it is loaded from on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ringlip' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
