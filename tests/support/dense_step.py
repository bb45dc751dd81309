"""What a training step must equal: the gradient of one dense float64 computation on the concatenated batch.

    # {parameter: relative error}, on real ranks.
    errors = gradient_errors(Case(stage=3), world=2, pieces=[Pieces(2), Pieces(4, "per_micro_batch")])

The engine runs with an optimizer that puts gradients aside instead of using them, so that they are read exactly as any
optimizer meets them, at every ZeRO stage, several steps in a row on the same weights.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (DeepSpeed imports it late: once here is faster than once a rank)
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import tiny_batch, tiny_model
from trainer.core import distributed
from trainer.core.types import Batch, Embeddings
from trainer.engine import Engine, EngineSettings, build_engine
from trainer.engine.state import WEIGHT, read_state
from trainer.models.adapt.mask import MaskSettings
from trainer.models.adapt.recompute import Layers, recompute
from trainer.step import GradReduction, train_step


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of a whole batch (arXiv 2303.15343): mean over images of the sum over texts."""
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -logsigmoid(signs * logits).sum() / len(image)


class GatheredSigmoid(nn.Module):
    """The loss contract in its plainest form: every rank gathers all embeddings and differentiates the sum over
    ranks."""

    def forward(self, z: Embeddings) -> Tensor:
        return _Gathered.apply(*z[:4])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        everyone = [[torch.empty_like(x) for _ in range(distributed.world_size())] for x in (image, text)]
        if distributed.world_size() > 1:
            dist.all_gather(everyone[0], image.contiguous())
            dist.all_gather(everyone[1], text.contiguous())
        else:
            everyone = [[image], [text]]
        me = distributed.rank()
        images, texts = ([part.double().requires_grad_() for part in column] for column in everyone)
        own = [scale.double().requires_grad_(), bias.double().requires_grad_()]
        others = [value.detach() for value in own]
        with torch.enable_grad():
            all_texts = torch.cat(texts)
            losses = []
            for owner, part in enumerate(images):
                logits = (own if owner == me else others)[0] * part @ all_texts.T + (own if owner == me else others)[1]
                signs = -torch.ones_like(logits)
                start = sum(len(p) for p in images[:owner])
                signs[range(len(part)), range(start, start + len(part))] = 1
                losses.append(-logsigmoid(signs * logits).sum() / len(part))
            gradients = torch.autograd.grad(torch.stack(losses).sum(), [images[me], texts[me], *own])
        ctx.save_for_backward(*(gradient.float() for gradient in gradients))
        return losses[me].float()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:  # type: ignore[override]
        return tuple(incoming * gradient for gradient in ctx.saved_tensors)


class Capture(torch.optim.Optimizer):
    """Puts each gradient aside and leaves the weights alone."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["gradient"] = parameter.grad.clone()


def captured(engine: Engine) -> dict[str, Tensor]:
    """What Capture put aside, whole, on rank 0 (other ranks get nothing, and must call)."""
    return {name: tensor.clone() for name, kind, tensor in read_state(engine.ds_engine) if kind == "gradient"}


def weights(engine: Engine) -> dict[str, Tensor]:
    """The fp32 weights, whole, on rank 0 (other ranks get nothing, and must call)."""
    return {name: tensor.clone() for name, kind, tensor in read_state(engine.ds_engine) if kind == WEIGHT}


class Pieces(NamedTuple):
    """How one step is cut."""

    micro_batch: int | None
    grad_reduction: GradReduction = "per_step"


@dataclass(frozen=True)
class Case:
    """An engine: where tensors live, and what its model does."""

    stage: int = 1
    offload: str = ""
    """"optimizer" and "parameters" in any combination."""
    rows: int = 16
    """Global batch."""
    kind: str = "siglip"
    dropout: float = 0.0
    recompute: Layers = "none"
    lora: bool = False
    mask: MaskSettings | None = None
    locked: str = ""
    """Names beginning with this are not trained."""
    compile: bool = False

    def model(self) -> Any:
        model = tiny_model(self.kind, dropout=self.dropout, mask=self.mask or MaskSettings())
        if self.lora:
            add_lora(model)
        for name, parameter in model.named_parameters():
            if self.locked and name.startswith(self.locked):
                parameter.requires_grad_(False)
        for tower in (model.towers.vision_model, model.towers.text_model):
            recompute(tower, self.recompute, offload=True)
        return model

    def engine(
        self,
        make_optimizer: Callable[[Any], Any] = Capture,
        precision: str = "fp32",
        clip: float = 0.0,
        model: Any = None,
    ) -> Engine:
        model = model if model is not None else self.model()
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 100_000}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # else tensors this small are never partitioned
        if "optimizer" in self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if "parameters" in self.offload:
            zero["offload_param"] = {"device": "cpu"}
        optimizer = make_optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ds_config.json"
            path.write_text(json.dumps({"zero_optimization": zero}))
            settings = EngineSettings(ds_config=str(path), precision=precision, compile=self.compile)  # type: ignore[arg-type]
            return build_engine(model, optimizer, settings, clip)


def add_lora(model: Any) -> None:
    """Low-rank adapters on the attention projections, their second factor not zero, everything else but the scale and
    bias locked."""
    head = list(model.head.parameters())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    for parameter in head:
        parameter.requires_grad_(True)


global_batch = functools.cache(tiny_batch)


def local_slice(batch: Batch) -> Batch:
    """This rank's part of a global batch."""
    return batch.split(batch.rows // distributed.world_size())[distributed.rank()]


def seed_rank(rank: int) -> None:
    """Ranks draw different dropout masks."""
    torch.manual_seed(1000 + rank)


def reference(case: Case, world: int, micro_batch: int | None, data_seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the dense computation in float64, all ranks' random numbers drawn as they draw them."""
    model = replace(case, recompute="none").model().double().train()
    image, text = [], []
    # The model's own .float() would round embeddings.
    with torch.random.fork_rng(), patch.object(torch.Tensor, "float", torch.Tensor.double):
        for rank, part in enumerate(global_batch(case.rows, data_seed).split(case.rows // world)):
            seed_rank(rank)
            for micro in part.split(micro_batch or part.rows):
                z = model(micro.pixels, micro.tokens, micro.token_mask)
                image.append(z.image)
                text.append(z.text)
    loss = dense_sigmoid(torch.cat(image), torch.cat(text), z.scale, z.bias)
    assert loss.dtype == torch.float64
    loss.backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    return loss.item(), gradients


def steps_of(case: Case, pieces: list[Pieces]) -> list[tuple[float, dict[str, Tensor]]]:
    """On one rank: a step each, on other data each time; (loss, captured gradients)."""
    engine = case.engine()
    found = []
    for data_seed, (micro_batch, grad_reduction) in enumerate(pieces):
        seed_rank(distributed.rank())
        result = train_step(
            engine,
            local_slice(global_batch(case.rows, data_seed)),
            GatheredSigmoid(),
            micro_batch,
            grad_reduction=grad_reduction,
        )
        assert not result.skipped
        found.append((result.loss, captured(engine)))
    return found


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter, |found - wanted| / |wanted|; what is zero but for rounding (key biases) is measured against the
    largest gradient."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    largest = max(float(w.norm()) for w in wanted.values())
    return {n: float((found[n].double() - w).norm()) / max(float(w.norm()), 1e-2 * largest) for n, w in wanted.items()}


def gradient_errors(case: Case, world: int, pieces: list[Pieces], timeout: float = 60.0) -> dict[str, float]:
    """The largest relative error of loss and gradients on ``world`` ranks, by parameter and step."""
    references = [reference(case, world, piece.micro_batch, seed) for seed, piece in enumerate(pieces)]
    results = run_ranks(steps_of, world, case, pieces, timeout=timeout)[0]
    errors = {}
    for piece, (loss, found), (wanted_loss, wanted) in zip(pieces, results, references, strict=True):
        errors[f"{piece} loss"] = abs(loss - wanted_loss) / abs(wanted_loss)
        errors |= {f"{piece} {name}": error for name, error in relative_errors(found, wanted).items()}
    return errors
