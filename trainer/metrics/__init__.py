"""What a run says of itself: a progress line, ``log.jsonl``, ``environment.json`` and trackers.

    log = RunLog(run_dir, settings, total_samples, recipe=recipe.model_dump(mode="json"), samples_seen=start)
    with log.waiting():
        batch = next(batches)
    # Every rank, every step.
    log.step(step, samples_seen, {"loss": ..., "lr": ..., "grad_norm": ..., "scale": ..., "bias": ...})
    with log.paused():  # not training time
        log.note(samples_seen, {"eval": evaluate(...)})
    log.close()

``log.jsonl`` has one JSON object a line: every ``log.every`` steps the values of that step with ``pairs_per_second``,
``step_seconds``, ``seconds`` (of training since the run began, stops not counted), ``memory_bytes`` and ``data_wait``
(share of time, both of the worst rank), with several ranks ``rank_seconds`` (of a step until ranks first need each
other: the least, the median, the most) and the ``slowest_rank``; and what ``note`` is given. A number that is none
(NaN, infinity) is null there, and said.
"""

from trainer.metrics.environment import write_environment
from trainer.metrics.log import LogSettings, RunLog
from trainer.metrics.meters import Stopwatch

__all__ = ["LogSettings", "RunLog", "Stopwatch", "write_environment"]
