"""A model of ZeRO's memory: bytes on the device and on the host in every phase of a step, for a ds_config.

    peak = forecast(survey, zero, Job(ranks=8, local_batch=4096, micro_batch=64))
    peak.total, peak.parts["activations"], peak.phase, peak.host

Follows DeepSpeed 0.19's flat buffers: ZeRO 1 and 2 keep the model's float32 weights whole and a second copy of the
rank's partition for the optimizer; ZeRO-3 keeps partitions of weights, of the optimizer's copy and of gradients, and
gathers weights as layers need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.engine.ds_config import BUCKET_ELEMENTS, reduces_early
from trainer.losses.base import PairSettings
from trainer.losses.sigmoid import KERNEL_TILE_ROWS
from trainer.losses.tiles import default_tile_rows
from trainer.losses.topology import num_slices
from trainer.optim import AdamWSettings, OptimSettings, moment_bytes
from trainer.plan.device import Device
from trainer.plan.profile import Survey

PARTS = ("parameters", "gradients", "optimizer", "activations", "loss", "embeddings", "inputs", "buffers")
MOST_REUSE = 1_000_000_000  # DeepSpeed's defaults, in elements, where trainer.engine sets none
PREFETCH = 50_000_000
PERSISTENT = 100_000
NOTHING = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Job:
    """One step as one rank sees it."""

    ranks: int
    local_batch: int
    """Pairs of the global batch that fall to each rank."""
    micro_batch: int
    grad_reduction: str = "auto"
    loss: PairSettings | None = None
    node_ranks: int = 1
    optim: OptimSettings = field(default_factory=AdamWSettings)
    average: bool = False
    """Whether a running average of the weights is kept (optim.ema)."""
    teacher: Survey | None = None
    """The model that a distilled one learns from, whole on every rank."""
    inputs_on_host: bool = True
    """Where the local batch waits: only a micro-batch of it is on the device when True."""

    def reduces_early(self, survey: Survey, zero: dict[str, Any]) -> bool:
        """Whether gradients are reduced after every micro-batch, as the engine will decide it."""
        if self.grad_reduction == "auto":
            return reduces_early(zero, float(survey.trainable), self.ranks)
        return self.grad_reduction == "per_micro_batch" and zero.get("stage", 0) >= 2

    @property
    def num_micro_batches(self) -> int:
        return -(-self.local_batch // self.micro_batch)


@dataclass(frozen=True)
class Peak:
    """Bytes at the worst moment of a step."""

    parts: dict[str, float]
    phase: str
    host: float
    """Bytes in host memory: offloaded states and activations."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _States:
    """Memory that outlives a step (device and host), and what each phase adds to it."""

    device: dict[str, float]
    host: float
    gradients: float
    """Held while micro-batches add to them."""
    first_grows: bool
    """True where gradients appear only as the first backward pass makes them."""
    gather: tuple[float, float, float]
    """ZeRO-3's gathered weights: as the forward pass begins, as it ends, in the backward pass."""
    finish: dict[str, float]
    """Added to the states in the averaging over ranks."""
    step: dict[str, float]
    """Added to the states in the optimizer's step."""


def forecast(survey: Survey, zero: dict[str, Any], job: Job) -> Peak:
    """The worst phase of a step in the steady state, once the optimizer has its moments."""
    states = _states(survey, zero, job)
    phases = list(_phases(survey, states, job))
    return replace(max(phases, key=lambda peak: peak.total), host=max(peak.host for peak in phases))


def _phases(survey: Survey, states: _States, job: Job) -> Iterator[Peak]:
    rows = min(job.micro_batch, job.local_batch)
    inputs = survey.image_bytes + survey.token_bytes + 16.0
    batch = inputs * (rows if job.inputs_on_host else job.local_batch)
    joint = 4.0 * survey.embed_dim * job.local_batch  # one tower's embeddings
    host = states.host + (inputs * job.local_batch if job.inputs_on_host else 0)
    parked = host + survey.training.host_bytes(rows)
    loss = loss_bytes(survey.embed_dim, job, survey.device)
    training, inference = survey.training, survey.inference

    teacher = job.teacher
    watching = {"parameters": float(teacher.parameters + teacher.buffers)} if teacher else {}
    taught = 8.0 * teacher.embed_dim * job.local_batch if teacher else 0.0  # its embeddings, until the loss has run

    def at(phase: str, on_host: float = host, **more: float) -> Peak:
        parts = dict.fromkeys(PARTS, 0.0) | {"inputs": batch} | watching
        parts["embeddings"] = taught if phase in ("teacher", "forward", "pass 1", "loss") else 0.0
        for source in (states.device, more):
            for part, size in source.items():
                parts[part] += size
        return Peak(parts, phase, on_host)

    start, end, back = states.gather
    if teacher is not None:
        yield at("teacher", activations=teacher.inference.peak(rows))
    if job.num_micro_batches == 1:
        yield at("forward", buffers=start)
        yield at("forward", parked, activations=training.forward_peak(rows), buffers=end)
        yield at("loss", parked, activations=training.saved(rows), loss=loss, buffers=back)
        held, whole = 4 * joint, states.gradients
        activations = training.peak(rows, gradients=states.first_grows) - (whole if states.first_grows else 0)
        yield at("backward", parked, activations=activations, gradients=whole, embeddings=held, buffers=back)
    else:
        yield at("pass 1", embeddings=2 * joint, buffers=start)
        yield at("pass 1", activations=inference.peak(rows), embeddings=2 * joint, buffers=end)
        yield at("loss", loss=loss, embeddings=2 * joint)
        held = 4 * joint
        later = {"gradients": states.gradients, "embeddings": held}  # from the second micro-batch on
        yield at("pass 2", parked, activations=training.forward_peak(rows), embeddings=held, buffers=end)
        if (
            job.num_micro_batches > 2
        ):  # DeepSpeed does not prefetch in the second, whose order of layers it meets for the first time
            yield at("pass 2", buffers=start, **later)
            yield at("pass 2", parked, activations=training.forward_peak(rows), buffers=end, **later)
        yield at("pass 2", parked, activations=training.peak(rows), buffers=back, **later)
    yield at("averaging", embeddings=held, **states.finish)
    yield at("optimizer", embeddings=held, **states.step)


def loss_bytes(width: int, job: Job, device: Device) -> float:
    """Bytes of the exchange and of one tile of logits, beyond the embeddings (see trainer/losses/tiles.py). A slice
    is the part of a rank's texts that one message holds."""
    settings = job.loss or PairSettings()
    rows = job.local_batch
    lanes = {"gather": job.ranks, "hierarchical": min(job.node_ranks, job.ranks)}.get(settings.exchange, 1)
    slices = num_slices(rows, lanes, device)
    piece = 4.0 * width * -(-rows // slices)
    travels = job.ranks > lanes
    buffers = piece * (2 * (slices + 1) if travels else slices)
    buffers += piece * (lanes - 1) * 5
    num_tiles = 2 if getattr(settings, "name", "sigmoid") == "sigmoid" else 3
    texts = -(-rows // slices)
    tile = 4.0 * min(settings.tile_rows or default_tile_rows(device), rows) * texts
    own = 4.0 * width * rows + buffers
    if device == "cuda" and settings.precision == "fast" and getattr(settings, "plain", False):
        # The fused kernel leaves a tile's gradient in float16, and nothing else.
        own += 4.0 * width * rows + 2.0 * min(settings.tile_rows or KERNEL_TILE_ROWS, rows) * texts
    elif settings.precision == "fast":  # both embeddings and a tile's gradient once more, in float16
        own += 4.0 * width * rows + (num_tiles + 0.5) * tile
    else:
        own += num_tiles * tile
    if job.teacher is None:
        return own
    # The divergence runs after the loss, whose two gradients wait; it sends the teacher's texts along and holds five
    # tiles.
    riders = piece * job.teacher.embed_dim / width * ((slices + 1 if travels else 0) + 2 * (lanes - 1))
    return max(own, 8.0 * width * rows + 4.0 * width * rows + buffers + riders + 5 * tile)


def _moments(survey: Survey, job: Job) -> float:
    """Bytes of what is kept beside the trained weights, on all ranks together: the optimizer's moments, the running
    average."""
    return moment_bytes(job.optim, survey.shapes) + job.average * survey.trainable


def _states(survey: Survey, zero: dict[str, Any], job: Job) -> _States:
    stage = int(zero.get("stage", 0))
    whole, trained, share = float(survey.parameters), float(survey.trainable), 1.0 / job.ranks
    part, moments = trained * share, _moments(survey, job)
    bucket = (
        4.0 * zero.get("reduce_bucket_size", BUCKET_ELEMENTS) * (2 if zero.get("overlap_comm") and stage < 3 else 1)
    )
    gather = min(whole, 4.0 * zero.get("allgather_bucket_size", BUCKET_ELEMENTS)) if job.ranks > 1 else 0.0
    model = {"buffers": float(survey.buffers)}
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if stage == 0:
        reduced = min(trained, 4.0 * BUCKET_ELEMENTS) if job.ranks > 1 else 0.0
        device = {"parameters": whole, "optimizer": moments, **model}
        finish = {"gradients": trained, "buffers": reduced}
        return _States(device, 0.0, trained, True, NOTHING, finish, {"gradients": trained})
    if stage == 3:
        return _third(survey, zero, job, offloads)
    each = job.reduces_early(survey, zero)
    host, device = 0.0, {"parameters": whole, "optimizer": part + moments * share, **model}
    averaged = part
    if offloads:
        host, averaged = 3 * part + moments * share + survey.largest, 0.0
        device = {"parameters": whole, "buffers": model["buffers"] + survey.largest}
        host += part if each else 0.0
    twice = 2 if job.num_micro_batches > 1 else 1  # those of a micro-batch, beside the sum of those before it
    gradients = twice * averaged + bucket if each else trained
    # Gradients that fill the bucket are dropped; it is flattened once more for the exchange, and only then the
    # partition is allocated.
    filled = 0.0 if each else min(trained, 4.0 * zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    flat = filled if job.ranks > 1 else 0.0
    finish = {"gradients": averaged if each else trained - filled, "buffers": bucket + max(averaged, flat)}
    step = {"gradients": 2 * averaged, "buffers": 0.0} if 2 * averaged >= gather else {"buffers": gather}
    return _States(device, host, gradients, not each, NOTHING, finish, step)


def _third(survey: Survey, zero: dict[str, Any], job: Job, offloads: bool) -> _States:
    whole, trained = float(survey.parameters), float(survey.trainable)
    part, moments = trained / job.ranks, _moments(survey, job) / job.ranks
    bucket = 4.0 * zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    threshold = zero.get("stage3_param_persistence_threshold", PERSISTENT)
    kept = float(sum(size for numel, size in survey.small.items() if numel <= threshold))
    prefetch = min(whole, 4.0 * zero.get("stage3_prefetch_bucket_size", PREFETCH))
    reuse = min(zero.get("stage3_max_reuse_distance", MOST_REUSE), zero.get("stage3_max_live_parameters", MOST_REUSE))
    # Weights that are used again within the reuse distance stay gathered to the end of the forward pass. A gather lands
    # in a flat buffer first, and two prefetches are under way while the pass begins; in the backward pass layers are
    # fetched one by one.
    away = whole - kept
    parked = (zero.get("offload_param") or {}).get("device", "none") != "none"
    held = min(away, 4.0 * reuse) if job.ranks > 1 or parked else 0.0
    gather = (held + min(held, 2 * prefetch), held + min(held / 3, 2 * prefetch), min(held, 4.0 * survey.largest))
    each = job.reduces_early(survey, zero)
    device = {"parameters": whole / job.ranks + kept, "optimizer": part + moments, "gradients": part}
    device["buffers"] = bucket + survey.buffers
    host, flat = 0.0, part
    if offloads:
        host = 3 * part + moments
        device = {"parameters": device["parameters"], "buffers": device["buffers"]}
        flat = 0.0
    if parked:
        host += whole / job.ranks
        device["parameters"] = kept
    # Gradients stay until the bucket that they were copied into is full, and are put in order once more for the
    # exchange.
    filled = min(trained, bucket)
    finish = {"gradients": filled if each else trained, "buffers": filled}
    gradients = (2 * bucket if trained > bucket else 0.0) if each else trained
    return _States(device, host, gradients, not each, gather, finish, {"gradients": flat})
