"""What a run records: a progress line, ``log.jsonl``, ``environment.json`` and trackers.

    log = RunLog(run_dir, settings, total_samples, recipe=recipe.model_dump(mode="json"), samples_seen=start)
    with log.waiting():
        batch = next(batches)
    # Every rank, every step.
    log.step(step, samples_seen, {"loss": ..., "lr": ..., "grad_norm": ..., "scale": ..., "bias": ...})
    with log.paused():  # not training time
        log.note(samples_seen, {"eval": evaluate(...)})
    log.close()

``log.jsonl`` has one JSON object per line: every ``log.every`` steps the values of that step with ``pairs_per_second``,
``step_seconds``, ``seconds`` (training time since the run began, without stops), ``memory_bytes`` and ``data_wait``
(share of time, both of the worst rank); with several ranks also ``rank_seconds`` (time of a step until ranks first wait
for each other: least, median, most) and the ``slowest_rank``; ``vitals``, what the model
looks like in that step (vitals.py); ``advice`` (advice.py); and the values passed to ``note``. NaN and infinity are
written as null, with a warning.
"""

from trainer.metrics.environment import write_environment
from trainer.metrics.log import LogSettings, RunLog
from trainer.metrics.meters import Stopwatch

__all__ = ["LogSettings", "RunLog", "Stopwatch", "write_environment"]
