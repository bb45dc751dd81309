"""engine.compile: the step of compiled layers against float64 and against the layers as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.dense_step import Case, Pieces, captured, global_batch, reference, relative_errors, seed_rank
from trainer.core import distributed
from trainer.core.types import UserError
from trainer.engine import compiled
from trainer.engine.compiled import compile_layers
from trainer.losses import SigmoidLoss
from trainer.step import train_step

CASES = [
    (Case(stage=0, compile=True), Pieces(None)),
    (Case(stage=1, compile=True), Pieces(6)),  # 6, 6 and 4 rows
    (Case(stage=2, compile=True, recompute="all"), Pieces(6)),
    (Case(stage=1, compile=True, lora=True), Pieces(6)),
    (Case(stage=1, compile=True, kind="clip"), Pieces(6)),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    distributed.init(60)


def gradients(case: Case, pieces: Pieces, precision: str = "fp32") -> tuple[float, dict[str, torch.Tensor]]:
    engine = case.engine(precision=precision)
    seed_rank(0)
    result = train_step(engine, global_batch(case.rows, 0), SigmoidLoss(), pieces.micro_batch)
    return result.loss, captured(engine)


@pytest.mark.parametrize(("case", "pieces"), CASES, ids=str)
def test_gradients_are_those_of_float64(case: Case, pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # traced as for inductor, which takes seconds a layer
    loss, found = gradients(case, pieces)
    wanted_loss, wanted = reference(case, 1, None, 0)
    errors = relative_errors(found, wanted)
    assert abs(loss - wanted_loss) <= 5e-6 * abs(wanted_loss)
    assert max(errors.values()) <= 5e-6, max(errors, key=lambda name: errors[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="apt-get install g++ runs torch.compile's test")
def test_inductor_drops_in_pass_2_what_pass_1_dropped() -> None:
    """Dropout, two passes, recomputation: the gradients are those of the layers as they are, which draw the same."""
    pieces = Pieces(8)
    found = [
        gradients(Case(stage=1, dropout=0.3, recompute="all", compile=compile), pieces) for compile in (False, True)
    ]
    (loss, wanted), (compiled_loss, mine) = found
    assert abs(compiled_loss - loss) <= 1e-6 * abs(loss)
    assert max(relative_errors(mine, {n: g.double() for n, g in wanted.items()}).values()) <= 1e-5


def test_layers_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each tower and pass, whatever the number of layers, and names stay as they are."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = Case().model()
    names = list(model.state_dict())
    monkeypatch.setattr(compiled, "BACKEND", backend)
    assert compile_layers(model, 1) == 4
    assert list(model.state_dict()) == names
    batch = global_batch(6, 0)
    with torch.no_grad():
        model(batch.pixels, batch.tokens, batch.token_mask)
    assert len(graphs) == 2


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.compile: ZeRO-3 .* ZeRO 0 to 2"):
        Case(stage=3, compile=True).engine()
    with pytest.raises(UserError, match=r"engine\.compile: Linear has no list of layers"):
        compile_layers(nn.Linear(2, 2), 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"engine\.compile: .* C\+\+ compiler"):
        compile_layers(nn.Linear(2, 2), 0)
