"""Every objective against a float64 dense reference, on one rank and on several with uneven batches and tiles."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.support import dense_losses
from trainer.core.types import Embeddings, UserError
from trainer.losses import (
    NegativeSettings,
    QueueLoss,
    SigmoidLoss,
    SinkhornLoss,
    SoftmaxLoss,
    TripletLoss,
    matched_samples,
)

SIZES = ([17], [9, 12, 4])
LIMIT = 1e-6
MILD = ((10.0, -10.0), (60.0, -10.0), (120.0, 0.0))


def check(make, reference, sizes, temperatures=((10.0, -10.0), (120.0, -20.0), (120.0, 0.0)), near=1.0):
    """``near`` 0.35 gives the matched cosines of trained models (0.3). Where the loss is made of logits around t = 120
    themselves, the rounding of one float32 logit is already 4e-6."""
    batches = [
        dense_losses.batch(sum(sizes), t=t, b=b, near=near, seed=seed) for seed, (t, b) in enumerate(temperatures)
    ]
    for found, z in zip(dense_losses.errors(make, reference, batches, sizes), batches, strict=True):
        assert max(found.values()) <= LIMIT, (z.scale, z.bias, found)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("same_group", ["negative", "mask", "positive"])
def test_sigmoid_and_groups(sizes, same_group):
    def reference(z):
        if same_group == "negative":
            return dense_losses.sigmoid(z)
        if same_group == "positive":
            same = dense_losses.same(z)
            weight = torch.where(same, 1 / same.sum(1, keepdim=True).double(), 1.0)
            return dense_losses.sigmoid(z, positives=same, weight=weight)
        return dense_losses.sigmoid(z, weight=(~dense_losses.same(z) | dense_losses.eye(z)).double())

    check(lambda: SigmoidLoss(tile_rows=5, same_group=same_group), reference, sizes)


@pytest.mark.parametrize("make", [SigmoidLoss, SoftmaxLoss], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("repeats", [4, 32])
def test_captions_that_repeat_change_neither_the_scale_of_the_loss_nor_that_of_its_gradients(make, repeats):
    """Positives weigh 1/k: at the start (unrelated images and captions) all is as where nothing repeats, within a factor
    of 2; summed positives would give 4 and 32 times that."""
    rows, found = 128, []
    for times in (1, repeats):
        z = dense_losses.batch(rows, t=10.0, b=-10.0, near=0.0)
        image, text = (x[: rows // times].repeat(times, 1) for x in (z.image, z.text))
        leaves = [x.clone().requires_grad_() for x in (image, text, z.bias)]
        loss = make(same_group="positive")(
            Embeddings(leaves[0], leaves[1], z.scale, leaves[2], torch.arange(rows) % (rows // times))
        )
        loss.backward()
        found.append([loss.detach(), *(leaf.grad.norm() for leaf in leaves[: 3 if make is SigmoidLoss else 2])])
    for alone, repeated in zip(*found, strict=True):
        assert 0.5 < repeated / alone < 2


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("keep", ["hardest", "easiest"])
@pytest.mark.parametrize("same_group", ["negative", "mask"])
def test_extreme_negatives_of_the_global_batch(sizes, keep, same_group):
    """The K hardest (easiest) of all B (B - 1) logits, however they are spread over ranks."""

    def reference(z):
        rows = z.image.shape[0]
        candidates = ~dense_losses.same(z) if same_group == "mask" else ~dense_losses.eye(z)
        values = dense_losses.logits(z).detach()
        order = values[candidates].sort(descending=keep == "hardest").values
        last = order[round(2.5 * rows) - 1]
        # Between the last logit that stays and the next: float32 logits differ from these by rounding.
        last = (last + order[round(2.5 * rows)]) / 2
        kept = candidates & (values >= last if keep == "hardest" else values <= last)
        assert kept.sum() == round(2.5 * rows)
        return dense_losses.sigmoid(z, weight=(kept | dense_losses.eye(z)).double())

    check(
        lambda: SigmoidLoss(tile_rows=5, same_group=same_group, negatives=NegativeSettings(keep=keep, ratio=2.5)),
        reference,
        sizes,
        MILD,
        0.35,
    )


def test_random_negatives_do_not_depend_on_ranks_and_come_at_the_ratio():
    settings = NegativeSettings(keep="random", ratio=8.0, seed=3)
    z = dense_losses.batch(240, b=-2.0)

    def run(sizes, rows, samples_seen, exchange="ring"):
        def make():
            loss = SigmoidLoss(tile_rows=rows, exchange=exchange, negatives=settings)
            loss.progress(samples_seen, 10_000)
            return loss

        ranks = dense_losses.run_ranks(dense_losses.on_ranks, len(sizes), make, [z], sizes)
        image = torch.cat([rank[0][1][0] for rank in ranks]) / len(sizes)
        return sum(rank[0][0] for rank in ranks) / len(sizes), image

    alone = run([240], 64, 512)
    for sizes, exchange in (([100, 140], "ring"), ([80, 80, 80], "bidirectional"), ([80, 80, 80], "gather")):
        loss, image = run(sizes, 33, 512, exchange)
        assert abs(loss - alone[0]) / alone[0] < LIMIT
        assert dense_losses.relative(image, alone[1].double()) < LIMIT
    assert abs(run([240], 64, 513)[0] - alone[0]) / alone[0] > 1e-4

    loss = SigmoidLoss(negatives=settings)
    loss.progress(512, 10_000)
    loss(z)
    kept = loss.scored_pairs.item() - 240
    assert abs(kept - 8 * 240) < 4 * (8 * 240) ** 0.5  # four standard deviations of the count
    kept_all = SigmoidLoss()
    kept_all(z)
    assert kept_all.scored_pairs.item() == 240 * 240


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_weighted_negatives(sizes):
    def reference(z):
        return dense_losses.sigmoid(z, weight=torch.where(dense_losses.eye(z), 1.0, 0.125))

    check(lambda: SigmoidLoss(tile_rows=7, negatives=NegativeSettings(weight=0.125)), reference, sizes)


def test_negatives_warm_up_from_one_per_positive():
    settings = NegativeSettings(keep="hardest", warmup=0.5)
    assert settings.ratio_at(0, 1000, 64) == 1
    assert settings.ratio_at(250, 1000, 64) == pytest.approx(63**0.5)
    assert settings.ratio_at(500, 1000, 64) is None
    loss, z = SigmoidLoss(tile_rows=7, negatives=settings), dense_losses.batch(64)
    seen = []
    for samples in (0, 250, 400, 500):
        loss.progress(samples, 1000)
        loss(z)
        seen.append(loss.scored_pairs.item())
    assert seen == [128, 64 + round(63**0.5 * 64), 64 + round(63**0.8 * 64), 64 * 64]
    with pytest.raises(ValueError, match="warmup"):
        NegativeSettings(ratio=0.5, warmup=0.1)


def test_matched_samples_keep_the_number_of_scored_pairs():
    settings = NegativeSettings(ratio=15.0)
    assert matched_samples(settings, 1000, 256) == 16_000  # 256 pairs an image become 16
    assert matched_samples(NegativeSettings(), 1000, 256) == 1000


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax(sizes, smoothing):
    check(
        lambda: SoftmaxLoss(tile_rows=5, label_smoothing=smoothing),
        partial(dense_losses.softmax, smoothing=smoothing),
        sizes,
        near=0.35,
    )


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_shares_the_target_among_a_group(sizes, smoothing):
    def reference(z):
        positives, rows = dense_losses.same(z).double(), z.image.shape[0]
        target = (1 - smoothing) * positives / positives.sum(1, keepdim=True) + smoothing / rows
        values = dense_losses.logits(z)
        return -(target * (values.log_softmax(1) + values.log_softmax(0))).sum() / (2 * rows)

    check(lambda: SoftmaxLoss(tile_rows=5, same_group="positive", label_smoothing=smoothing), reference, sizes)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_softmax_masks_a_group(sizes):
    def reference(z):
        values = dense_losses.logits(z).masked_fill(dense_losses.same(z) & ~dense_losses.eye(z), float("-inf"))
        return -(values.log_softmax(1).diagonal() + values.log_softmax(0).diagonal()).mean() / 2

    check(lambda: SoftmaxLoss(tile_rows=5, same_group="mask"), reference, sizes, near=0.35)
    with pytest.raises(UserError, match="label_smoothing"):
        SoftmaxLoss(same_group="mask", label_smoothing=0.1)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("size", [20, 60])
def test_queue_holds_past_texts_in_their_global_order(sizes, size):
    """Smaller and larger than the batch (25 or 17): four calls, each against a dense queue; all ranks hold the same
    one."""
    past: list[torch.Tensor] = []

    def reference(z):
        values = dense_losses.logits(z)
        queue = torch.cat(past)[-size:] if past else z.text[:0].detach()
        wide = torch.cat([values, z.scale * z.image @ queue.T + z.bias], 1)
        past.append(z.text.detach())
        return -(wide.log_softmax(1).diagonal() + values.log_softmax(0).diagonal()).mean() / 2

    temperatures = ((10.0, 0.0), (20.0, 0.0), (120.0, 0.0), (40.0, -1.0))
    check(lambda: QueueLoss(tile_rows=5, width=32, size=size), reference, sizes, temperatures, 0.35)


@pytest.mark.parametrize("size", [5, 8, 40])
def test_a_step_of_the_queue_can_be_taken_back(size):
    """Bit for bit, whether a batch overwrites a part of it, wraps around or replaces it all; twice, as a step that
    fails twice does."""
    loss = QueueLoss(tile_rows=3, width=32, size=size)
    loss(dense_losses.take(dense_losses.batch(6), [6], 0)).backward()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    restore = loss.snapshot()
    for number in (1, 2):
        loss(dense_losses.take(dense_losses.batch(7 + number), [7 + number], 0)).backward()
        assert loss.taken == before["taken"] + 7 + number and not torch.equal(loss.queue, before["queue"])
        restore()
        assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


def test_queue_is_left_alone_by_evaluation_and_refuses_another_width():
    loss, z = QueueLoss(width=32, size=8), dense_losses.batch(6)
    with torch.no_grad():
        loss(z)
    loss.eval()
    loss(dense_losses.take(z, [6], 0)).backward()
    assert loss.taken.item() == 0 and not loss.queue.any()
    loss.train()
    loss(dense_losses.take(z, [6], 0)).backward()
    assert loss.taken.item() == 6 and torch.equal(loss.queue[:6], z.text)
    with pytest.raises(UserError, match=r"loss\.width"):
        QueueLoss(width=16, size=8)(z)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_targets(sizes, iterations):
    def reference(z):
        cost = (z.image @ z.text.T).detach() / 0.1
        g = torch.zeros(cost.shape[0], dtype=torch.float64)
        for _ in range(iterations):
            before = g
            f = -(cost + before).logsumexp(1)
            g = -(cost + f[:, None]).logsumexp(0)
        by_row, by_column = (cost + f[:, None] + before).exp(), (cost + f[:, None] + g).exp()
        assert torch.allclose(by_row.sum(1), torch.ones(()).double()) and torch.allclose(
            by_column.sum(0), torch.ones(()).double()
        )
        targets = [0.3 * dense_losses.eye(z) + 0.7 * plan for plan in (by_row, by_column)]
        values = dense_losses.logits(z)
        return -(targets[0] * values.log_softmax(1) + targets[1] * values.log_softmax(0)).sum() / (2 * cost.shape[0])

    make = lambda: SinkhornLoss(tile_rows=5, mix=0.7, temperature=0.1, num_iterations=iterations)  # noqa: E731
    check(make, reference, sizes, ((10.0, 0.0), (120.0, -1.0)), near=0.35)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("same_group", ["negative", "mask"])
@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_triplet_with_the_hardest_negative(sizes, same_group, margin):
    def reference(z):
        values = z.image @ z.text.T
        left_out = dense_losses.same(z) if same_group == "mask" else dense_losses.eye(z)
        negatives = values.masked_fill(left_out, float("-inf"))
        matched = values.diagonal()
        return (
            F.relu(margin + negatives.amax(1) - matched) + F.relu(margin + negatives.amax(0) - matched)
        ).sum() / len(matched)

    check(lambda: TripletLoss(tile_rows=5, margin=margin, same_group=same_group), reference, sizes, near=0.35)


@pytest.mark.parametrize("make", [lambda: SigmoidLoss(same_group="mask"), lambda: SoftmaxLoss(same_group="positive")])
def test_groups_are_asked_for_by_name(make):
    with pytest.raises(UserError, match=r"loss\.same_group"):
        make()(Embeddings(*dense_losses.batch(4)[:4]))
