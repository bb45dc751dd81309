"""engine.compile: the step of compiled layers against float64 and against the layers as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config

from tests.support.dense_step import Case, Pieces, captured, global_batch, reference, relative_errors, seed_rank
from tests.support.forked_ranks import run_ranks
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
    (Case(stage=1, compile=True, lora=True, recompute="all"), Pieces(6)),
    (Case(stage=1, compile=True, kind="clip"), Pieces(6)),
]


def gradients(case: Case, pieces: Pieces, backend: str) -> tuple[float, dict[str, Tensor]]:
    dynamo_config.fail_on_recompile_limit_hit = True  # else layers would run as without compilation, and be exact
    with patch.object(compiled, "BACKEND", backend):
        engine = case.engine()
    seed_rank(0)
    result = train_step(engine, global_batch(case.rows, 0), SigmoidLoss(), pieces.micro_batch)
    return result.loss, captured(engine)


@pytest.mark.parametrize(("case", "pieces"), CASES, ids=str)
def test_gradients_are_those_of_float64(case: Case, pieces: Pieces) -> None:
    # Traced as for inductor, which takes seconds a layer.
    loss, found = run_ranks(gradients, 1, case, pieces, "aot_eager")[0]
    wanted_loss, wanted = reference(case, 1, None, 0)
    errors = relative_errors(found, wanted)
    assert abs(loss - wanted_loss) <= 5e-6 * abs(wanted_loss)
    assert max(errors.values()) <= 5e-6, max(errors, key=lambda name: errors[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="apt-get install g++ runs torch.compile's test")
def test_inductor_drops_in_pass_2_what_pass_1_dropped() -> None:
    """Dropout, two passes, recomputation: the gradients are those of the layers as they are, which draw the same."""
    (loss, wanted), (compiled_loss, mine) = (
        run_ranks(
            gradients, 1, Case(stage=1, dropout=0.3, recompute="all", compile=on), Pieces(8), "inductor", timeout=300
        )[0]
        for on in (False, True)
    )
    assert abs(compiled_loss - loss) <= 1e-6 * abs(loss)
    assert max(relative_errors(mine, {n: g.double() for n, g in wanted.items()}).values()) <= 1e-5


def shared() -> tuple[int, int, bool]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = Case().model()
    names = list(model.state_dict())
    with patch.object(compiled, "BACKEND", backend):
        layers = compile_layers(model, 1)
    batch = global_batch(6, 0)
    with torch.no_grad():
        model(batch.pixels, batch.tokens, batch.token_mask)
    return layers, len(graphs), list(model.state_dict()) == names


def test_layers_share_what_is_compiled() -> None:
    """One graph for each tower, whatever the number of layers, and names stay as they are."""
    assert run_ranks(shared, 1) == [(4, 2, True)]


def graphs_of_a_run(case: Case) -> list[int]:
    dynamo_config.fail_on_recompile_limit_hit = True
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model, batch, counts = case.model(), global_batch(case.rows, 0), []
    with patch.object(compiled, "BACKEND", backend):
        engine = case.engine(model=model)
    for micro_batch in (6, 5, 3, 6, 5):  # 6, 6, 4 rows; 5, 5, 5, 1; ...
        train_step(engine, batch, SigmoidLoss(), micro_batch)
        counts.append(len(graphs))
    model.eval()
    for rows in (16, 7):
        part = batch.split(rows)[0]
        with torch.no_grad():
            model(part.pixels, part.tokens, part.token_mask)
        counts.append(len(graphs))
    return counts


@pytest.mark.parametrize(
    "case",
    [
        Case(compile=True),
        Case(compile=True, lora=True, recompute=2),
        Case(compile=True, locked="towers.vision_model.encoder.layers.0"),
    ],
    ids=str,
)
def test_a_run_stays_compiled(case: Case) -> None:
    """Uneven and smaller micro-batches, locked layers, adapters, evaluation: no layer falls back, no size compiles
    twice."""
    first, second, *others, evaluated, again = run_ranks(graphs_of_a_run, 1, case)[0]
    assert 0 < first <= second < evaluated == again
    assert set(others) == {second}


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.compile: ZeRO-3 .* ZeRO 0 to 2"):
        compile_layers(nn.Linear(2, 2), 3)
    with pytest.raises(UserError, match=r"engine\.compile: Linear has no list of layers"):
        compile_layers(nn.Linear(2, 2), 0)
    headers = compiled.sysconfig.get_path("include")
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CPATH", raising=False)
    with pytest.raises(UserError, match=r"engine\.compile: .* no Python\.h"):
        compile_layers(nn.Linear(2, 2), 0)
    monkeypatch.setenv("CPATH", headers)
    with pytest.raises(UserError, match="Linear has no list of layers"):  # the headers are found
        compile_layers(nn.Linear(2, 2), 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "clang++").touch(0o755)  # which torch does not look for
    with pytest.raises(UserError, match=r"engine\.compile: .* C\+\+ compiler"):
        compile_layers(nn.Linear(2, 2), 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"engine\.compile: .* C\+\+ compiler"):
        compile_layers(nn.Linear(2, 2), 0)
