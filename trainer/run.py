"""The components of a run, its ``samples_seen``, and its hooks.

run = build(recipe)
run.hooks.append(Hook("measuring drift", every=100_000, call=my_function))
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.io.files import write_atomic
from data_tools.io.formatting import count
from trainer import checkpoint, config, evals, losses, models
from trainer.checkpoint import Checkpointer, Resumed
from trainer.config import Recipe
from trainer.core import distributed
from trainer.core.logs import EVERY_NODE
from trainer.core.settings import changes
from trainer.core.types import Batch, UserError
from trainer.data import Loader
from trainer.data.gather import gather_skipped
from trainer.defaults import decide, look_at_captions
from trainer.distill import StoredTeacher, TeacherModel, build_teacher
from trainer.engine import Engine, build_engine
from trainer.losses import PairLoss, TaughtLoss
from trainer.metrics import vitals
from trainer.models import DualEncoder
from trainer.models.param_groups import tower_of
from trainer.optim import Guard, build_optimizer, learning_rate, scale_ceiling
from trainer.plan.auto import micro_batch
from trainer.step import StepResult, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hook:
    """A periodic action of the training loop: saving, evaluating, or your own function.

    ``call`` runs on every rank at the same step and may use collectives; a dict that it returns becomes a line of
    ``log.jsonl``. Its time does not count in rates.
    """

    activity: str
    """Its name in messages of the watchdog, such as "evaluating"."""
    every: int
    """Samples between two calls; 0: only as the flags below say."""
    call: Callable[[Run], dict[str, Any] | None]
    at_end: bool = True
    """Also after the last step of the run."""
    at_stop: bool = False
    """Also after the step at which a signal stops the run."""
    at_start: bool = False
    """Also before the first step."""

    def due(self, before: int, after: int, finished: bool, stopped: bool) -> bool:
        """Whether it runs after a step from ``before`` to ``after`` samples seen."""
        if stopped:
            return self.at_stop
        return (finished and self.at_end) or crosses(self.every, before, after)


@dataclass
class Run:
    """The components of a run and its ``samples_seen``."""

    recipe: Recipe
    model: DualEncoder
    engine: Engine
    loss: PairLoss | TaughtLoss
    teacher: TeacherModel | StoredTeacher | None
    guard: Guard
    checkpointer: Checkpointer
    ceiling: float | None
    micro_batch: int | None
    decisions: list[str]
    """What was decided where the recipe says `auto`, a line each; the rates first."""
    samples_seen: int = 0
    history: evals.History = field(default_factory=evals.History)
    """What was evaluated so far."""
    hooks: list[Hook] = field(default_factory=list)
    """Called in this order."""

    @property
    def directory(self) -> Path:
        return self.recipe.run.directory

    @property
    def total(self) -> int:
        """Samples at the end of the run, in whole global batches."""
        return self.recipe.num_steps * self.recipe.batch.size

    def observed_step(self, batch: Batch) -> tuple[StepResult, dict[str, float]]:
        """``step``, and what it says of the model (metrics/vitals.py), with how far it moved each tower's weights."""
        motion = self.engine.motion(tower_of)
        before = motion.weights()
        result = self.step(batch, sample=vitals.rows_per_rank(distributed.world_size()))
        if result.sample is None:  # the loss was not finite
            return result, {}
        moved = {f"update_{tower}": float(f"{ratio:.5g}") for tower, ratio in motion.ratios(before).items()}
        return result, vitals.measure(result.sample, batch.groups) | moved

    def step(self, batch: Batch, sample: int = 0) -> StepResult:
        """One update; all its random numbers depend on (seed, samples_seen, rank)."""
        recipe, engine = self.recipe, self.engine
        checkpoint.seed_step(recipe.run.seed, self.samples_seen, distributed.rank())
        engine.set_learning_rate(self.rate)
        self.model.progress(self.samples_seen, self.total)
        self.loss.progress(self.samples_seen, self.total)
        result = train_step(
            engine,
            batch,
            self.loss,
            self.micro_batch,
            grad_reduction=recipe.batch.grad_reduction,
            guard=self.guard,
            teacher=self.teacher,
            sample=sample,
        )
        if self.ceiling is not None:
            engine.cap_scale(self.ceiling)
        if recipe.optim.ema and not result.skipped:
            engine.average_weights(recipe.optim.ema)
        self.micro_batch = result.micro_batch
        self.samples_seen += recipe.batch.size
        return result

    @property
    def rate(self) -> float:
        """Learning rate of the next step, taken at its middle, so that neither the first nor the last step has rate
        0."""
        return learning_rate(self.recipe.optim, self.samples_seen + self.recipe.batch.size // 2, self.total)

    @property
    def main_loss(self) -> PairLoss:
        """The recipe's own loss, also inside a distillation loss, so that its buffers (a queue) have one name in
        checkpoints."""
        return self.loss.main if isinstance(self.loss, TaughtLoss) else self.loss

    @property
    def evaluates(self) -> bool:
        """Whether the recipe names anything to evaluate on."""
        return evals.asked_for(self.recipe.eval, self.recipe.data)

    @property
    def starts_trained(self) -> bool:
        """Whether the run begins with a model that can do something already."""
        return self.recipe.model.path is not None or self.recipe.checkpoint.resume not in ("auto", "never")

    @property
    def owes_evaluation(self) -> bool:
        """Whether an evaluation at the present ``samples_seen`` is due and has not been made: of the model that a run
        starts from, or where a run was cut off between saving and evaluating."""
        if not self.evaluates or self.history.at(self.samples_seen):
            return False
        before = self.samples_seen - self.recipe.batch.size
        crossed = before >= 0 and crosses(self.recipe.eval.every, before, self.samples_seen)
        return crossed or (self.starts_trained and not self.history.records)

    @property
    def out_of_patience(self) -> bool:
        """Whether ``eval.patience`` ends the run here."""
        return 0 < self.recipe.eval.patience <= self.history.since_best

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the current model, with averaged weights if there are any (``optim.ema``); returns a note for the
        log."""
        recipe, rank, world = self.recipe, distributed.rank(), distributed.world_size()
        with (
            self.engine.averaged() if recipe.optim.ema else nullcontext(False) as average,
            self.model.with_every_tower(),
        ):
            found = evals.run(self.engine, recipe.eval, self.model.preprocess, rank, world, data=recipe.data)
        self.history.add(self.samples_seen, found)
        logger.info(f"evaluated at {self.samples_seen:,} samples: {evals.brief(found)}")
        if self.starts_trained and (lower := self.history.below_base(found)):
            logger.warning(f"worse than the model that this run started from: {', '.join(lower)}")
        return {"eval": found, "weights": "ema"} if average else {"eval": found}

    def evaluate_and_keep(self, loader: Loader) -> dict[str, Any]:
        """``evaluate``; saves the best by ``checkpoint.best`` and notes that it is."""
        note = self.evaluate()
        history = self.history
        if history.names and history.improved and history.best is not None:
            self.save(loader)
            record = {"metric": list(history.names), "score": history.best[1], "weights": note.get("weights", "")}
            self.checkpointer.keep_as_best(self.samples_seen, record)
        return note

    def save(self, loader: Loader) -> None:
        """Saves a checkpoint, with the number and names of replaced samples."""
        extra = {"guard": self.guard.state_dict(), "skipped": gather_skipped(loader.skipped), "tower": self.model.tower}
        extra["selection"] = loader.reader.selection
        if self.teacher is not None:
            extra["teacher"] = self.teacher.record
        if self.engine.loss_scale is not None:
            extra["loss_scale"] = self.engine.loss_scale.state_dict()
        self.checkpointer.save(self.engine, self.samples_seen, extra, self.main_loss)


def build(recipe: Recipe) -> Run:
    """Builds model, engine and loss, with the same weights on all ranks, from the seed or from a pretrained model."""
    world = distributed.world_size()
    distributed.per_rank(recipe.batch.size, world)
    checkpoint.seed_step(recipe.run.seed, 0, 0)
    model = models.build(recipe.model)
    recipe, decisions = decide(recipe, model, look_at_captions(recipe, model))
    main, teacher = losses.build(recipe.loss), None
    if recipe.distill is not None:
        teacher = build_teacher(recipe.distill, model.preprocess, recipe.engine.computes_in, recipe.data)
    loss = main if recipe.distill is None else TaughtLoss(main, recipe.distill.weight, recipe.loss)
    if world > 1:
        loss.connect(distributed.device())
    start_scale = model.head.logit_scale.detach().exp().item()
    optimizer = build_optimizer(model, recipe.optim, model.parameter_groups(recipe.model.rates))
    engine = build_engine(model, optimizer, recipe.engine, clip=recipe.optim.clip)
    return Run(
        recipe=recipe,
        model=model,
        engine=engine,
        loss=loss.to(distributed.device()),  # a queue must be on the embeddings' device
        teacher=teacher,
        guard=Guard(recipe.optim),
        checkpointer=Checkpointer(recipe.run.directory, recipe.checkpoint),
        ceiling=scale_ceiling(recipe.optim, start_scale),
        micro_batch=micro_batch(recipe),
        decisions=decisions,
    )


def check_tower(run: Run, resumed: Resumed) -> None:
    """Checks that a precomputed tower, which is not part of the checkpoint, is the one that the rest was trained
    for."""
    before, now = resumed.extra.get("tower", ""), run.model.tower
    if before and now and before != now:
        raise UserError(
            f"{resumed.folder} was trained on stored embeddings of another tower (fingerprint {before[:12]}, that of "
            f"model.precomputed is {now[:12]}): use that tower, or start another run.directory"
        )


def check_selection(run: Run, resumed: Resumed, loader: Loader) -> None:
    """Checks that a run goes on with the samples that it was trained on: with others, the order would be another."""
    own = run.directory.resolve() in resumed.folder.resolve().parents
    if own and resumed.extra.get("selection", "") != loader.reader.selection:
        raise UserError(
            f"data.where selects other samples than {resumed.folder} was trained on (the condition, or its columns, "
            f"have changed): restore them, or start another run.directory with checkpoint.resume={resumed.folder}"
        )


def describe(run: Run) -> None:
    """Writes the recipe and DeepSpeed's configuration into the run directory."""
    # Under ZeRO-3 a partitioned parameter is empty; DeepSpeed stores its size in an attribute.
    sizes = [
        (parameter.requires_grad, getattr(parameter, "ds_numel", parameter.numel()))
        for parameter in run.model.parameters()
    ]
    trained, locked = (sum(size for trains, size in sizes if trains is which) for which in (True, False))
    logger.info(
        f"{run.directory}: {count(trained)} parameters to train, {count(locked)} locked; "
        f"{run.recipe.num_steps:,} steps of {run.recipe.batch.size:,} pairs on {distributed.world_size()} rank(s), "
        f"{run.recipe.engine.ds_config_on(distributed.world_size())}, {run.recipe.engine.computes_in}, "
        f"micro-batch {run.micro_batch or 'whole'}; {run.decisions[0]}"
    )
    for line in run.decisions[1:]:
        logger.log(logging.WARNING if line.startswith("warning: ") else logging.INFO, line.removeprefix("warning: "))
    if not distributed.is_main():
        return
    run.directory.mkdir(parents=True, exist_ok=True)
    keep_other_recipe(run)
    for name, text in (
        ("recipe.yaml", config.dump(run.recipe)),
        ("deepspeed.json", json.dumps(run.engine.merged_config, indent=1) + "\n"),
    ):
        write_atomic(run.directory / name, text)


def keep_other_recipe(run: Run) -> None:
    """If a run resumes with another recipe, logs what has changed and keeps the former recipe beside the new one."""
    before = run.directory / "recipe.yaml"
    if not run.samples_seen or not before.is_file():
        return
    try:
        old = config.load(before).model_dump(mode="json")
    except UserError:  # written by another version: compared as it is
        old = config.read_yaml(before)
    changed = changes(Recipe, old, run.recipe.model_dump(mode="json"))
    if changed:
        kept = before.with_name(f"recipe-until-{run.samples_seen:09d}.yaml")
        os.replace(before, kept)
        logger.info(f"the recipe has changed (the former one is now {kept}): {'; '.join(changed)}")


def say_finished(run: Run, hint: str = "") -> None:
    """Logs the last line of a run, once per node. launch/multinode.sh looks for it, because DeepSpeed's launcher also
    exits with 0 when it was killed."""
    logger.info(f"{run.directory}: finished at {run.samples_seen:,} samples{hint}", extra=EVERY_NODE)


def crosses(every: int, before: int, after: int) -> bool:
    """Whether a multiple of ``every`` is in (before, after]; False if it is 0."""
    return every > 0 and before // every != after // every
