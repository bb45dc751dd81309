"""Trains a model as a recipe describes, from the start or from a run's last checkpoint.

    deepspeed --module trainer.train trainer/recipes/glyphs.yaml [section.key=value ...]     # all GPUs of this node
    torchrun --nproc-per-node 8 -m trainer.train RECIPE                                      # the same
    python -m trainer.train RECIPE                                                           # one rank

A run directory with checkpoints is resumed, with any number of ranks, any micro-batch and any ds_config. Exit codes:
0 finished; 2 a mistake in the recipe or the data; 75 stopped by a signal after saving (start the same command again);
anything else a failure of a rank, a machine or a worker (start again; the scripts in launch/ do).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from data_tools.io.errors import run_command
from trainer import config, evals
from trainer.checkpoint import Resumed, RunLock
from trainer.config import Recipe
from trainer.core import distributed
from trainer.core.collectives import on_main
from trainer.data import Loader, SkippedSamples, build_loader
from trainer.data.gather import gather_sample_ids
from trainer.metrics import RunLog
from trainer.metrics.advice import Advisor, Situation
from trainer.run import Hook, Run, build, check_selection, check_tower, describe, say_finished
from trainer.runtime.signals import EXIT_AGAIN, StopSignals
from trainer.runtime.watchdog import Watchdog

logger = logging.getLogger("trainer.train")  # not __name__, which is __main__ here


def main(argv: list[str]) -> int:
    return start(config.from_command_line("deepspeed --module trainer.train", __doc__ or "", argv))


def start(recipe: Recipe, hooks: Sequence[Hook] = ()) -> int:
    """Joins the process group, locks the run directory, trains; returns the exit code."""
    watchdog = Watchdog(recipe.run.heartbeat_timeout, recipe.run.timeout)
    with (
        distributed.process_group(recipe.run.timeout + watchdog.head_start),
        watchdog as watch,
        RunLock(recipe.run.directory),
    ):
        return train(recipe, watch, hooks)


def train(recipe: Recipe, watch: Watchdog, hooks: Sequence[Hook] = ()) -> int:
    """Trains to the end, or until a signal; returns the exit code. ``hooks`` run in addition to saving and
    evaluating."""
    on_main(partial(evals.check, recipe.eval, recipe.data))  # before a wrong path costs hours of training
    run = build(recipe)
    code = _train(run, watch, hooks)
    run.engine.close()  # not after an error: it waits for the device
    return code


def _train(run: Run, watch: Watchdog, hooks: Sequence[Hook]) -> int:
    recipe = run.recipe  # nothing in it is `auto` any more
    resumed = resume(run)
    run.history = read_history(run)
    if run.samples_seen >= run.total:
        say_finished(run, "; raise run.samples to train on")
        return 0
    if run.out_of_patience:
        say_finished(run, patience_words(run))
        return 0
    loader = build_loader(
        recipe.data,
        run.model.preprocess,
        recipe.batch.size,
        distributed.rank(),
        distributed.world_size(),
        recipe.run.seed,
        run.samples_seen,
        recipe.distill.stored if recipe.distill else None,
    )
    if resumed is not None:
        check_selection(run, resumed, loader)  # before anything is written
        if distributed.is_main():
            loader.skipped = SkippedSamples(**resumed.extra["skipped"])
    describe(run)
    # Saving comes first: a scheduler that has sent a signal does not wait forever.
    saving = Hook("saving a checkpoint", recipe.checkpoint.every, lambda run: run.save(loader), at_stop=True)
    evaluating = Hook(
        "evaluating", recipe.eval.every, lambda run: run.evaluate_and_keep(loader), at_start=run.owes_evaluation
    )
    run.hooks = [saving, *([evaluating] if run.evaluates else []), *hooks]
    tree = recipe.model_dump(mode="json")
    advisor = Advisor(Situation.of(tree))
    log = RunLog(run.directory, recipe.log, run.total, tree, run.samples_seen, advisor)
    try:
        with StopSignals() as signals:
            return loop(run, loader, log, signals, watch)
    finally:
        loader.close()
        log.close()
        run.checkpointer.join()


def resume(run: Run) -> Resumed | None:
    """Loads the checkpoint to resume from, if there is one."""
    resumed = run.checkpointer.resume(run.engine, run.main_loss)
    if resumed is None:
        return None
    run.samples_seen = resumed.samples_seen
    run.guard.load_state_dict(resumed.extra["guard"])
    if run.teacher is not None and run.directory.resolve() in resumed.folder.resolve().parents:
        run.teacher.check_resumed(resumed.extra.get("teacher"))
    if run.engine.loss_scale is not None and "loss_scale" in resumed.extra:
        run.engine.loss_scale.load_state_dict(resumed.extra["loss_scale"])
    check_tower(run, resumed)
    if not run.recipe.optim.ema:
        run.engine.average_weights(0.0)  # drops a former average, which would never be updated again
    logger.info(f"resumed at {run.samples_seen:,} samples from {resumed.folder}")
    return resumed


def read_history(run: Run) -> evals.History:
    """The run's evaluations up to where it resumes; the best is the one whose checkpoint is there."""
    history = evals.read_history(run.directory, run.samples_seen, run.recipe.checkpoint.best)
    if history.best is not None and run.checkpointer.best(run.samples_seen) != history.best[0]:
        history.best, history.since_best = None, 0  # the next evaluation is the best that can be kept
    return history


def patience_words(run: Run) -> str:
    """What to say of a run that eval.patience ended."""
    assert run.history.best is not None
    place, score = run.history.best
    names, count = " and ".join(run.history.names), run.history.since_best
    return f"; no better {names} in {count} evaluations (eval.patience), the best is {score:.1%} at {place:,} samples"


def call_hooks(run: Run, due: list[Hook], log: RunLog, watch: Watchdog, step: int) -> None:
    """Runs them in their order, and writes down what they return."""
    if due:
        log.flush()  # a run that resumes from this checkpoint must find the earlier lines in the log
    for hook in due:
        watch.doing(hook.activity, step)
        with log.paused():
            note = hook.call(run)
        if note:
            log.note(run.samples_seen, note)


def loop(run: Run, loader: Loader, log: RunLog, signals: StopSignals, watch: Watchdog) -> int:
    """The training loop: steps, logs, runs the hooks that are due. Returns the exit code."""
    stop: str | None = None
    size = run.recipe.batch.size
    call_hooks(run, [hook for hook in run.hooks if hook.at_start], log, watch, run.samples_seen // size)
    while run.samples_seen < run.total and stop is None and not run.out_of_patience:
        step = run.samples_seen // size + 1
        watch.doing("reading data", step)
        with log.waiting():
            batch = next(loader)
        watch.doing("training", step)
        before, rate = run.samples_seen, run.rate
        logged = log.due(step, before + size)
        result, vitals = run.observed_step(batch) if logged else (run.step(batch), {})
        values = {key: getattr(result, key) for key in ("loss", "grad_norm", "scale", "bias")} | {"lr": rate}
        counts: dict[str, Any] = {
            "spikes": run.guard.num_spikes,
            "bad_steps": run.guard.num_bad_steps,
            "replaced": loader.skipped.count,
        }
        if run.engine.loss_scale is not None:
            counts |= {"loss_scale": run.engine.loss_scale.value, "overflows": run.engine.loss_scale.num_overflows}
        if logged:
            counts |= {"vitals": vitals} | ({"noise": spoiled} if (spoiled := loader.noise_counts()) else {})
        log.step(step, run.samples_seen, values | counts, result.local_seconds)
        if result.skipped:
            ids = gather_sample_ids(batch.ids)
            keys = loader.reader.keys(ids) if distributed.is_main() else []
            log.note(run.samples_seen, {"skipped_step": result.skipped, "keys": keys})
            run.guard.check()
        stop = signals.agreed()
        finished = run.samples_seen >= run.total
        due = [hook for hook in run.hooks if hook.due(before, run.samples_seen, finished, stop is not None)]
        call_hooks(run, due, log, watch, step)
        if run.out_of_patience:
            run.save(loader)
    watch.doing("waiting for the last checkpoint", run.samples_seen // size)
    run.checkpointer.close(run.samples_seen)
    if stop is not None:
        logger.info(f"stopped by {stop} at {run.samples_seen:,} samples, all saved: the same command resumes from here")
        return EXIT_AGAIN
    say_finished(run, patience_words(run) if run.out_of_patience else "")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
