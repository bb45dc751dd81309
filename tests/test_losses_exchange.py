"""The traversal: exact on every exchange and number of ranks, with the traffic its formula says, and with plain words
when a peer fails."""

import os
import time
from collections import Counter
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.support import dense_losses
from tests.support.forked_ranks import run_ranks
from trainer.core.distributed import RANKS_HERE
from trainer.core.types import Embeddings, SharedOutOfMemory, UserError
from trainer.losses import PeerLost, SigmoidLoss, SigmoidSettings, SoftmaxLoss, build
from trainer.losses import exchange as exchange_module
from trainer.losses.exchange import Sums, traverse
from trainer.losses.tiles import Pairs
from trainer.losses.topology import Ring

EXCHANGES = ("ring", "bidirectional", "gather", "hierarchical")
TEMPERATURES = [(10.0, -10.0), (120.0, -20.0), (120.0, 0.0)]


def uneven(world):
    return [11 + (5 * rank) % 7 for rank in range(world)]


def payload_and_sums(world, exchange, node_size, rows, payload_bytes, sum_bytes):
    """Bytes sent by all ranks: the formula in ring.py's docstring, ``rows`` of the global batch."""
    lanes = {"gather": world, "hierarchical": node_size}.get(exchange, 1)
    nodes = world // lanes
    return (nodes - 1 + nodes * (lanes - 1)) * rows * payload_bytes, (
        (nodes if nodes > 1 else 0) + nodes * (lanes - 1)
    ) * rows * sum_bytes


def check_exchange(world, exchange, node_size=None):
    sizes = uneven(world)
    batches = [dense_losses.batch(sum(sizes), t=t, b=b) for t, b in TEMPERATURES]
    make = lambda: SigmoidLoss(tile_rows=5, exchange=exchange, node_size=node_size)  # noqa: E731
    for found, z in zip(dense_losses.errors(make, dense_losses.sigmoid, batches, sizes), batches, strict=True):
        assert max(found.values()) <= 1e-6, (z.scale, z.bias, found)
    ranks = run_ranks(dense_losses.on_ranks, world, make, batches[:1], sizes)
    sent = Counter()
    for rank in ranks:
        sent.update(rank[0][2])
    expected = payload_and_sums(world, exchange, node_size, sum(sizes), 32 * 4, 32 * 4)
    assert (sent["text"], sent["sums"]) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("exchange", ["ring", "bidirectional", "gather"])
def test_gradients_and_traffic_of_every_exchange(world, exchange):
    check_exchange(world, exchange)


@pytest.mark.parametrize(("world", "node_size"), [(4, 2), (3, 1), (2, 2)])
def test_gradients_and_traffic_of_nodes(world, node_size):
    check_exchange(world, "hierarchical", node_size)


@pytest.mark.slow
@pytest.mark.parametrize("world", range(4, 9))
@pytest.mark.parametrize("exchange", ["ring", "bidirectional", "gather"])
def test_gradients_and_traffic_of_many_ranks(world, exchange):
    check_exchange(world, exchange)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "node_size"), [(6, 2), (6, 3), (8, 2), (8, 4)])
def test_gradients_and_traffic_of_many_nodes(world, node_size):
    check_exchange(world, "hierarchical", node_size)


def test_more_slices_of_a_larger_batch(monkeypatch):
    monkeypatch.setattr("trainer.losses.topology.SLICE_ROWS", 20)  # eight of 150 rows
    for exchange in EXCHANGES:
        sizes = [130, 7, 150, 128]
        make = partial(SigmoidLoss, tile_rows=60, exchange=exchange, node_size=2)
        (found,) = dense_losses.errors(make, dense_losses.sigmoid, [dense_losses.batch(sum(sizes))], sizes)
        assert max(found.values()) <= 1e-6


def test_traffic_of_equal_batches_is_the_docstrings_formula():
    """Each rank sends (W - 1) b d e + W b d 4 on the ring."""
    world, rows, width = 3, 8, 32
    for comm_dtype, gradient, e, g in (
        (None, "float32", 4, 4),
        ("bfloat16", "float32", 2, 4),
        ("bfloat16", "bfloat16", 2, 2),
    ):
        make = partial(SigmoidLoss, comm_dtype=comm_dtype, comm_gradient_dtype=gradient)
        for (_, _, sent), *_ in run_ranks(
            dense_losses.on_ranks, world, make, [dense_losses.batch(24, width)], [rows] * world
        ):
            assert sent == {"text": (world - 1) * rows * width * e, "sums": world * rows * width * g}


def test_every_pair_is_visited_once_and_sums_come_home():
    def work(exchange, node_size):
        rank, world = dist.get_rank(), dist.get_world_size()
        rows = 3 + rank
        ring = Ring(rows, (0, 0, 0), exchange, node_size)
        seen = []

        def visit(piece, payload, sums):
            numbers, names = payload
            assert (names == piece.owner).all() and len(numbers) == piece.rows
            seen.extend(numbers.tolist())
            sums[0] += 10**rank
            sums[1].copy_(torch.maximum(sums[1], torch.full_like(sums[1], rank)))

        numbers = torch.arange(rows) + 100 * rank
        count = Sums((), torch.int64, 0, torch.Tensor.add_)
        highest = Sums((2,), torch.float32, -1.0, lambda mine, other: torch.maximum(mine, other, out=mine))
        homes = traverse(ring, [numbers, torch.full((rows,), rank)], [count, highest], visit)
        assert sorted(seen) == [100 * r + i for r in range(world) for i in range(3 + r)]
        assert (homes[0] == int("1" * world)).all() and homes[0].shape == (rows,)
        assert (homes[1] == world - 1).all() and homes[1].is_contiguous()
        return True

    for exchange, node_size in (("ring", None), ("bidirectional", None), ("gather", None), ("hierarchical", 2)):
        assert all(run_ranks(work, 4, exchange, node_size))


def test_no_process_group_and_both_shapes_of_scale():
    assert not dist.is_initialized()
    for shape in ([], [1]):
        z = dense_losses.take(dense_losses.batch(9), [9], 0)
        z = z._replace(
            scale=z.scale.detach().reshape(shape).requires_grad_(), bias=z.bias.detach().reshape(shape).requires_grad_()
        )
        SigmoidLoss(tile_rows=4)(z).backward()
        assert z.scale.grad.shape == z.scale.shape and z.bias.grad.shape == z.bias.shape


def test_a_given_process_group():
    def work():
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        rank = dist.get_rank()
        z = dense_losses.take(dense_losses.batch(12), [5, 7], rank // 2)
        loss = SigmoidLoss(group=pairs[rank % 2])(z)
        loss.backward()
        return loss.item(), z.image.grad

    ranks = run_ranks(work, 4)
    truth = dense_losses.sigmoid(Embeddings(*[value.double() for value in dense_losses.batch(12)[:4]]))
    for first in (0, 1):
        assert (ranks[first][0] + ranks[first + 2][0]) / 2 == pytest.approx(truth.item(), rel=1e-6)


def test_evaluation_does_no_gradient_work():
    """Under no_grad: the same value, and no sums on the wire. Frozen texts: no sums either, the other gradients
    unchanged."""

    def work():
        mine = dense_losses.take(dense_losses.batch(12), [6, 6], dist.get_rank())
        loss = SigmoidLoss(tile_rows=4)
        with torch.no_grad():
            value = loss(mine)
        assert not value.requires_grad and not loss.traffic["sums"] and loss.traffic["text"]
        trained = loss(mine)
        trained.backward()
        assert torch.equal(value, trained.detach())
        expected = [leaf.grad.clone() for leaf in mine[:4]]
        loss.traffic.clear()
        locked = dense_losses.take(dense_losses.batch(12), [6, 6], dist.get_rank())._replace(text=mine.text.detach())
        loss(locked).backward()
        assert not loss.traffic["sums"]
        assert all(torch.equal(locked[place].grad, expected[place]) for place in (0, 2, 3))
        locked = dense_losses.take(dense_losses.batch(12), [6, 6], dist.get_rank())._replace(image=mine.image.detach())
        loss(locked).backward()
        assert torch.equal(locked.text.grad, expected[1])
        # Attributed to another side, the scale's gradient differs between ranks but not on average.
        both = torch.stack([locked.scale.grad, expected[2]])
        dist.all_reduce(both)
        torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=0)
        return True

    assert all(run_ranks(work, 2))


def test_gradients_are_handed_out_once_and_scaled_by_the_incoming_one():
    z = dense_losses.take(dense_losses.batch(9), [9], 0)
    (SigmoidLoss()(z) * 3).backward()
    other = dense_losses.take(dense_losses.batch(9), [9], 0)
    loss = SigmoidLoss()(other)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(z.image.grad, other.image.grad * 3)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_float64_embeddings_pass_gradcheck_precision():
    batch = dense_losses.batch(13, dtype=torch.float64)._replace(
        scale=torch.tensor([30.0], dtype=torch.float64), bias=torch.tensor(-3.0).double()
    )
    z = dense_losses.take(batch, [13], 0)
    SigmoidLoss(tile_rows=4)(z).backward()
    gradients = torch.autograd.grad(dense_losses.sigmoid(z), z[:4])
    for leaf, gradient in zip(z[:4], gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [10.0, 115.0])
def test_bf16_embeddings_err_less_than_their_rounding(t):
    """Against float64 on the unrounded embeddings, rounding alone makes some error; computing from rounded ones adds no
    more to it."""
    full = dense_losses.batch(96, width=256, t=t, b=-10.0, near=0.35)
    rounded = full._replace(image=full.image.bfloat16(), text=full.text.bfloat16())

    def gradients(z):
        leaves = [value.double().requires_grad_() for value in z[:4]]
        loss = dense_losses.sigmoid(Embeddings(*leaves))
        return loss.detach(), torch.autograd.grad(loss, leaves)

    (exact_loss, exact), (rounded_loss, best) = gradients(full), gradients(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss does not let autocast in
        z = dense_losses.take(rounded, [96], 0)
        loss = SigmoidLoss(tile_rows=40)(z)
    loss.backward()
    assert loss.dtype == torch.float32 and z.image.grad.dtype == torch.bfloat16
    assert abs(loss.item() - rounded_loss) <= abs(rounded_loss - exact_loss)
    for leaf, truth, floor in zip(z[:4], best, exact, strict=True):
        assert dense_losses.relative(leaf.grad, truth) <= dense_losses.relative(floor, truth)


def test_the_wires_dtype_rounds_alike_on_any_number_of_ranks():
    full = dense_losses.batch(24)
    rounded = full._replace(text=full.text.bfloat16().float())
    for sizes in ([24], [10, 14]):
        ranks = run_ranks(dense_losses.on_ranks, len(sizes), partial(SigmoidLoss, comm_dtype="bfloat16"), [full], sizes)
        truth = dense_losses.sigmoid(Embeddings(*[value.double() for value in rounded[:4]]))
        assert sum(rank[0][0] for rank in ranks) / len(sizes) == pytest.approx(truth.item(), rel=1e-6)


def test_bf16_sums_are_rounded_only_on_the_wire():
    (found,) = dense_losses.errors(
        partial(SigmoidLoss, comm_gradient_dtype="bfloat16"), dense_losses.sigmoid, [dense_losses.batch(24)], [8, 8, 8]
    )
    assert found["image"] <= 1e-6 and 1e-6 < found["text"] <= 3 * 2**-9  # a rounding for each of three hops


def test_precision_set_outside_changes_nothing_and_is_left_as_it_was():
    backend = torch.backends.mkldnn.matmul
    before, seen = backend.fp32_precision, []
    backend.fp32_precision = "bf16"
    try:
        hook = SigmoidLoss(tile_rows=4)
        objective = hook.objective

        def spy(pairs, *sides):
            sweep = pairs.sweep

            def spied(visit, *args, **kwargs):
                return sweep(lambda tile: (seen.append(backend.fp32_precision), visit(tile)), *args, **kwargs)

            pairs.sweep = spied
            return objective(pairs, *sides)

        hook.objective = spy
        hook(dense_losses.batch(9))
        assert set(seen) == {"ieee"} and backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


def test_an_all_zero_block_is_refused():
    def work():
        z = dense_losses.take(dense_losses.batch(12), [6, 6], dist.get_rank())
        if dist.get_rank() == 1:
            z = z._replace(text=torch.zeros_like(z.text, requires_grad=True))
        try:
            SigmoidLoss()(z)
        except RuntimeError as error:
            return str(error)
        return ""

    messages = run_ranks(work, 2)
    assert "rank(s) [1] arrived all zero" in messages[0] and not messages[1]


def test_embeddings_of_unequal_kind_are_refused_on_every_rank():
    def work(change):
        z = dense_losses.take(dense_losses.batch(12), [6, 6], dist.get_rank())
        if dist.get_rank() == 1:
            z = z._replace(**change(z))
        try:
            SigmoidLoss()(z)
        except UserError as error:
            return str(error)
        return ""

    for change in (
        lambda z: {"image": z.image[:, :8], "text": z.text[:, :8]},
        lambda z: {"text": z.text.bfloat16()},
        lambda z: {"text": z.text.detach()},
    ):
        assert all("rank 1 brought" in message for message in run_ranks(work, 2, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: {"text": z.text[:4]}, "one .rows, width. each"),
        (lambda z: {"scale": torch.ones(2)}, "one element"),
        (lambda z: {"image": z.image.long()}, "floating-point"),
        (lambda z: {"groups": z.groups.float()}, "int64"),
    ],
)
def test_malformed_embeddings_are_refused(change, message):
    z = dense_losses.batch(6)
    with pytest.raises(UserError, match=message):
        SigmoidLoss()(z._replace(**change(z)))


def test_nodes_must_divide_the_ranks():
    def work():
        try:
            SigmoidLoss(exchange="hierarchical", node_size=2)(dense_losses.batch(4))
        except UserError as error:
            return str(error)
        return ""

    assert all("node_size: 3 ranks do not divide into nodes of 2" in message for message in run_ranks(work, 3))


def _fail_at_hop(exchange, how, patience):
    """Rank 2 of 4 fails when it computes its second hop; the others say what they saw and how long it took."""
    rank = dist.get_rank()
    group = dist.new_group(timeout=timedelta(seconds=patience))
    z = dense_losses.take(dense_losses.batch(64), [16] * 4, rank)
    loss = SigmoidLoss(tile_rows=8, exchange=exchange, node_size=2, group=group)
    if rank == 2:
        seen = []
        objective = loss.objective

        def failing(pairs, *sides):
            against = pairs._against

            def count(texts, piece, *rest):
                seen.append(piece.owner)
                if len(set(seen)) == 2:
                    how()
                against(texts, piece, *rest)

            pairs._against = count
            return objective(pairs, *sides)

        loss.objective = failing
    start = time.monotonic()
    try:
        loss(z)
    except PeerLost as error:
        return str(error), time.monotonic() - start
    return "no error", time.monotonic() - start


def _die():
    os._exit(3)


def _hang():
    time.sleep(60)


def _survivors(exchange, how, patience):
    """What ranks 0, 1 and 3 report through files: the harness itself fails when a rank dies."""
    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:

        def work():
            rank = dist.get_rank()
            result = _fail_at_hop(exchange, how, patience)
            Path(folder, f"{rank}.json").write_text(json.dumps(result))
            time.sleep(0.2)  # so that rank 0, which holds the store, does not end first

        try:
            run_ranks(work, 4, timeout=patience + 8)
        except AssertionError as error:
            assert "rank 2" in str(error) or "[2]" in str(error), error
        return {int(path.stem): json.loads(path.read_text()) for path in Path(folder).iterdir()}


@pytest.mark.parametrize("exchange", ["ring", "hierarchical"])
def test_a_rank_that_dies_stops_the_others_with_its_name_and_the_hop(exchange):
    patience = 20
    reports = _survivors(exchange, _die, patience)
    assert {0, 1, 3} <= set(reports)
    assert all(
        seconds < patience and " at hop " in message for message, seconds in (reports[rank] for rank in (0, 1, 3))
    )
    # Its neighbours name it; who is further away names the neighbour that left because of it.
    assert "rank 2 at hop" in reports[1][0] or "rank 2 at hop" in reports[3][0]


def test_a_rank_that_hangs_stops_the_others_within_the_groups_timeout():
    reports = _survivors("ring", _hang, patience=3)
    assert {0, 1, 3} <= set(reports)
    assert all(" at hop " in message for message, _ in (reports[rank] for rank in (0, 1, 3)))
    assert "rank 2 at hop" in reports[3][0]


@pytest.mark.parametrize(
    ("loss", "exchange"), [(SigmoidLoss, "ring"), (SigmoidLoss, "gather"), (SoftmaxLoss, "hierarchical")]
)
@pytest.mark.parametrize("where", ["buffers", "tile"])
def test_running_out_of_memory_on_one_rank_is_known_to_all_and_leaves_nobody_waiting(loss, exchange, where):
    def work():
        rank = dist.get_rank()
        z = dense_losses.take(dense_losses.batch(64), [16] * 4, rank)
        module = loss(tile_rows=8, exchange=exchange, node_size=2)
        before = module(z).item()
        target, name, call = (
            (exchange_module._Traversal, "__init__", 0) if where == "buffers" else (Pairs, "_against", 3)
        )
        real, calls = getattr(target, name), iter(range(1000))

        def failing(self, *arguments):
            if rank == 2 and next(calls) == call:
                raise torch.OutOfMemoryError("injected")
            return real(self, *arguments)

        setattr(target, name, failing)
        with pytest.raises(SharedOutOfMemory):
            module(z)
        return module(z).item() == before

    assert run_ranks(work, 4) == [True] * 4


def test_hierarchical_asks_every_launcher_how_many_ranks_a_node_has(monkeypatch):
    def work():
        try:
            return Ring(3, (0, 0, 0), "hierarchical").node_size
        except UserError as error:
            return str(error)

    for name in RANKS_HERE:
        monkeypatch.delenv(name, raising=False)
    assert all("set loss.node_size" in text for text in run_ranks(work, 2))
    for name in RANKS_HERE:
        with monkeypatch.context() as here:
            here.setenv(name, "2")
            assert run_ranks(work, 2) == [2, 2]


def test_build_makes_what_the_recipe_says():
    loss = build(SigmoidSettings(tile_rows=64, exchange="bidirectional", comm_dtype="bfloat16", same_group="mask"))
    assert isinstance(loss, SigmoidLoss)
    assert (loss.tile_rows, loss.exchange, loss.comm_dtype, loss.same_group) == (
        64,
        "bidirectional",
        torch.bfloat16,
        "mask",
    )
    with pytest.raises(UserError, match=r"loss\.tile_rows"):
        SigmoidLoss(tile_rows=0)
