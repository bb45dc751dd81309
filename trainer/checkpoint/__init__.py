"""Saves and resumes runs: progress is one integer (``samples_seen``), the state is whole tensors by name, and
nothing is pickled.

    checkpointer = Checkpointer(run_dir, settings)
    resumed = checkpointer.resume(engine, loss)                        # the restored state, or None
    checkpointer.save(engine, samples_seen, {"step": step}, loss)      # every rank calls; rank 0 writes
    checkpointer.close(samples_seen)

A run may resume with another number of ranks, ZeRO stage, micro-batch or ds_config. Random states are not saved: the
random numbers of a step depend on (seed, samples_seen, rank), see ``seed_step``.
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
