"""Whole-tensor state out of and into real DeepSpeed engines: every ZeRO stage, number of ranks and offload to every
other."""

import itertools
from typing import Any, NamedTuple

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import pytest
import torch
from torch import Tensor, nn

from tests.support.forked_ranks import run_ranks
from trainer.core.distributed import rank, world_size
from trainer.engine.ema import average_weights
from trainer.engine.state import layout, read_state, restore_state, steps
from trainer.engine.state_names import AVERAGE, WEIGHT

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ROWS = 8
CPU = {"device": "cpu"}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self) -> Tensor:
        return self.logit_scale.exp()


class Toy(nn.Module):
    """Odd sizes, so that partitions cut parameters; a frozen layer; a one-element parameter."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2)
        self.frozen = nn.Linear(16, 5).requires_grad_(False)
        self.body = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.scale = Scale()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.conv(x - self.mean).flatten(1))
        return self.norm(self.body(hidden).tanh()) * self.scale()


def make_engine(
    stage: int, offload: str = "", width: int = 7, seed: int = 0, extra: dict[str, Any] | None = None
) -> Any:
    torch.manual_seed(seed)
    model = Toy(width)
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    # eps is large: AdamW divides rounding by rounding where a gradient is mathematically zero.
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, eps=1e-4, weight_decay=0.1
    )
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if "optimizer" in offload:
        zero["offload_optimizer"] = CPU
    if "param" in offload:
        zero["offload_param"] = CPU
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | (extra or {}),
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Global losses of steps [first, last): the data are a function of the step alone."""
    losses = []
    for step in range(first, last):
        x = torch.randn(ROWS, 3, 3, 3, generator=torch.Generator().manual_seed(step)).chunk(world_size())[rank()]
        loss = (engine(x) - x.flatten(1)[:, : engine.module.norm.normalized_shape[0]]).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / world_size())
    return losses


def snapshot(
    engine: Any, bucket_bytes: int = 100
) -> tuple[dict[str, list[str]], dict[str, int], dict[tuple[str, str], Tensor]]:
    """What rank 0 would write: also checks that the layout announced is the layout given."""
    announced = layout(engine)
    tensors = {(name, kind): tensor.clone() for name, kind, tensor in read_state(engine, bucket_bytes)}
    if rank() == 0:
        shapes = {(name, kind): tuple(tensor.shape) for (name, kind), tensor in tensors.items()}
        wanted = {(name, kind): shape for name, kinds in announced.items() for kind, shape in kinds.items()}
        assert list(shapes.items()) == list(wanted.items())
    return {name: list(kinds) for name, kinds in announced.items()}, steps(engine), tensors


class Layout(NamedTuple):
    """Where tensors live: what must not matter."""

    ranks: int
    stage: int
    offload: str = ""
    options: tuple[tuple[str, int], ...] = ()

    def make(self, seed: int) -> Any:
        return make_engine(self.stage, self.offload, seed=seed, extra=dict(self.options))


EVERY = [Layout(ranks, stage) for ranks, stage in itertools.product([1, 2, 4], [0, 1, 2, 3])]
SPECIAL = [
    Layout(2, 1, "optimizer"),
    Layout(4, 2, "optimizer"),
    Layout(2, 3, "optimizer"),
    Layout(2, 3, "optimizer, param"),
    Layout(2, 3, "", (("stage3_param_persistence_threshold", 30),)),  # small parameters are also kept whole
    Layout(2, 3, "", (("sub_group_size", 20),)),
    Layout(2, 1, "", (("parameter_alignment", True),)),
]
FEW = [Layout(2, 0), Layout(2, 1), Layout(2, 2), Layout(2, 3), Layout(1, 1), Layout(4, 3), SPECIAL[3]]


def begin(layout: Layout) -> tuple[Any, Any]:
    """Two steps; the state there; two more steps."""
    engine = layout.make(seed=0)
    train(engine, 0, 2)
    state = snapshot(engine)
    return state, train(engine, 2, 4)


def resume(layout: Layout, states: list[Any]) -> list[tuple[Any, Any]]:
    """Another engine, other initial weights, that has already trained elsewhere, takes each state, gives it back and
    goes on."""
    engine = layout.make(seed=1)
    train(engine, 50, 51)
    results = []
    for saved, saved_steps, tensors in states:
        restore_state(
            engine, saved, saved_steps, lambda name, kind, source=tensors: source[name, kind], bucket_bytes=150
        )
        results.append((snapshot(engine), train(engine, 2, 4)))
    return results


def assert_all_go_on(target: Layout, begun: dict[Layout, tuple[Any, Any]]) -> None:
    resumed = run_ranks(resume, target.ranks, target, [state for state, _ in begun.values()])[0]
    for (source, (state, straight)), (again, losses) in zip(begun.items(), resumed, strict=True):
        assert_same(state, again)
        if source == target:
            assert losses == straight
        else:
            assert losses == pytest.approx(straight, rel=2e-6), (source, target)


def assert_same(state: Any, again: Any) -> None:
    assert state[0] == again[0]
    assert state[1] == again[1] and set(state[1].values()) == {2}
    assert state[2].keys() == again[2].keys()
    for key, tensor in state[2].items():
        assert torch.equal(tensor.view(torch.int32), again[2][key].view(torch.int32)), key


@pytest.fixture(scope="module")
def few() -> dict[Layout, tuple[Any, Any]]:
    return {layout: run_ranks(begin, layout.ranks, layout)[0] for layout in FEW}


@pytest.fixture(scope="module")
def all_of_them(few: dict[Layout, tuple[Any, Any]]) -> dict[Layout, tuple[Any, Any]]:
    return few | {layout: run_ranks(begin, layout.ranks, layout)[0] for layout in EVERY + SPECIAL if layout not in few}


def test_every_stage_begins_alike(few: dict[Layout, tuple[Any, Any]]) -> None:
    first = few[FEW[0]][1]
    assert all(losses == pytest.approx(first, rel=2e-6) for _, losses in few.values())
    assert first[0] != first[1]


@pytest.mark.parametrize("target", FEW, ids=str)
def test_any_layout_goes_on_from_any_other(target: Layout, few: dict[Layout, tuple[Any, Any]]) -> None:
    assert_all_go_on(target, few)


@pytest.mark.slow
@pytest.mark.parametrize("target", EVERY + SPECIAL, ids=str)
def test_everything_to_everything(target: Layout, all_of_them: dict[Layout, tuple[Any, Any]]) -> None:
    assert_all_go_on(target, all_of_them)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_before_the_first_step_there_are_weights_alone(stage: int) -> None:
    def work() -> Any:
        engine = make_engine(stage)
        kinds, counts, tensors = snapshot(engine)
        other = make_engine(stage, seed=1)
        train(other, 50, 52)
        restore_state(other, kinds, counts, lambda name, kind: tensors[name, kind])
        return kinds, counts, train(engine, 0, 2), train(other, 0, 2)

    kinds, counts, fresh, restored = run_ranks(work, 2)[0]
    assert set(map(tuple, kinds.values())) == {(WEIGHT,)} and counts == {}
    assert fresh == restored  # moments of the steps elsewhere are gone


def test_bits_survive_the_way() -> None:
    """Negative zero, denormals and NaN payloads come back as they were: the sum over ranks is one of integers."""

    def work() -> Any:
        engine = make_engine(1)
        train(engine, 0, 1)
        kinds, counts, tensors = snapshot(engine)
        odd = torch.tensor([-0.0, 1e-42, float("inf"), float("nan")])
        for tensor in tensors.values():
            tensor.view(-1)[:4] = odd[: tensor.numel()]
        restore_state(engine, kinds, counts, lambda name, kind: tensors[name, kind])
        again = snapshot(engine)[2]
        return {
            key: torch.equal(tensor.view(torch.int32), again[key].view(torch.int32)) for key, tensor in tensors.items()
        }

    assert all(run_ranks(work, 2)[0].values())


def test_a_parameter_unfrozen_later_starts_alike_at_every_stage() -> None:
    """Without moments, with the others' step and its weight as the average: at ZeRO 1 to 3 it may share a flat
    partition with them."""

    def thawed(stage: int) -> Any:
        engine = make_engine(stage)
        for first in range(2):
            train(engine, first, first + 1)
            average_weights(engine, 0.5)
        kinds, counts, tensors = snapshot(engine)
        kinds = {name: [WEIGHT] if name.startswith("body") else k for name, k in kinds.items()}
        counts = {name: n for name, n in counts.items() if not name.startswith("body")}
        restore_state(engine, kinds, counts, lambda name, kind: tensors[name, kind])
        return *snapshot(engine), train(engine, 2, 4)

    found = {stage: run_ranks(thawed, 2, stage)[0] for stage in range(4)}
    for _, counts, tensors, losses in found.values():
        assert set(counts.values()) == {2}
        assert tensors["body.weight", "exp_avg"].abs().max() == 0 and tensors["conv.weight", "exp_avg"].abs().max() > 0
        assert torch.equal(tensors["body.weight", AVERAGE], tensors["body.weight", WEIGHT])
        assert not torch.equal(tensors["conv.weight", AVERAGE], tensors["conv.weight", WEIGHT])
        assert losses == pytest.approx(found[0][3], rel=1e-5)
