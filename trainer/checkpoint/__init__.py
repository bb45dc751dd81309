"""Saving and resuming: one integer (``samples_seen``) is the position, whole tensors by name are the state, and nothing
is pickled.

    checkpointer = Checkpointer(run_dir, settings)
    resumed = checkpointer.resume(engine, loss)                        # None, or where to go on
    checkpointer.save(engine, samples_seen, {"step": step}, loss)      # every rank calls; rank 0 writes
    checkpointer.close(samples_seen)

A run may go on with another number of ranks, another ZeRO stage, micro-batch or ds_config. Random states are not saved:
a step's randomness follows from (seed, samples_seen, rank), see ``seed_step``.
"""

from trainer.checkpoint.checkpointer import Checkpointer, CheckpointSettings
from trainer.checkpoint.state_io import Resumed, load, load_model, load_weights, save
from trainer.checkpoint.store import MANIFEST, find, find_best, newest_good, verify
from trainer.engine.rng import seed_step
from trainer.runtime.run_lock import RunLock

__all__ = [
    "MANIFEST",
    "CheckpointSettings",
    "Checkpointer",
    "Resumed",
    "RunLock",
    "find",
    "find_best",
    "load",
    "load_model",
    "load_weights",
    "newest_good",
    "save",
    "seed_step",
    "verify",
]
