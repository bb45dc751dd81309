"""Formats of moments: what rounding does, and that it depends on the element alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.core.partitioned import BLOCK, Moment, Piece
from trainer.optim.moments import LEAST, Format, bytes_per_element, make, round_at_random

SIZE = 20 * BLOCK + 37


def piece(start: int = 0, length: int | None = None, size: int = SIZE, name: str = "w") -> Piece:
    parameter = nn.Parameter(torch.zeros(size))
    return Piece(name, parameter, (size,), start, size - start if length is None else length, parameter, 0)


def values(size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 0, size)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("signed", [True, False])
def test_what_was_read_is_written_back_unchanged(format: Format, signed: bool) -> None:
    moment = make(piece(), format, "exp_avg", signed)
    moment.write(0, values() if signed else values().abs(), step=1)
    kept = moment.read(0, SIZE).float().clone()
    again = make(piece(), format, "exp_avg", signed)
    again.write(0, kept)
    assert torch.equal(again.read(0, SIZE).float(), kept)
    assert moment.num_bytes == pytest.approx(bytes_per_element(format, SIZE) * SIZE, rel=1e-2)


def test_random_rounding_keeps_the_mean_and_repeats_itself() -> None:
    value = torch.full((1 << 16,), 1.0 + 0.25 * 2**-7)  # a quarter of the way to the next bfloat16
    rounded = [round_at_random(value, first=0, key=key) for key in (1, 1, 2)]
    assert torch.equal(rounded[0], rounded[1])
    assert not torch.equal(rounded[0], rounded[2])
    for one in (rounded[0], rounded[2], -round_at_random(-value, 0, 3)):
        assert set(one.tolist()) == {1.0, 1 + 2**-7}
        assert (one > 1).float().mean().item() == pytest.approx(0.25, abs=0.008)  # 4.7 standard deviations
    both = (rounded[0] > 1).float() * (rounded[2] > 1).float()
    assert both.mean().item() == pytest.approx(0.0625, abs=0.005)  # steps are independent
    assert torch.equal(round_at_random(value[5:], first=5, key=1), rounded[0][5:])  # it is the number that counts
    exact = value.bfloat16().float()
    assert torch.equal(round_at_random(exact, 0, 1), exact)


def test_a_slow_second_moment_moves_in_bfloat16() -> None:
    moment = make(piece(), "bfloat16", "exp_avg_sq", signed=False)
    for step in range(1, 1001):
        moment.write(0, moment.read(0, SIZE).float() * 0.999 + 0.001, step)
    assert moment.read(0, SIZE).float().mean().item() == pytest.approx(1 - 0.999**1000, rel=2e-3)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_parts_round_as_the_whole_does(format: Format) -> None:
    def halves(cut: int) -> Tensor:
        parts: list[tuple[Moment, Tensor]] = [
            (make(piece(0, cut), format, "m"), values()[:cut]),
            (make(piece(cut), format, "m"), values()[cut:]),
        ]
        for moment, part in parts:
            moment.write(0, part, step=3)
        return torch.cat([moment.read(0, part.numel()).float() for moment, part in parts])

    whole = make(piece(), format, "m")
    for first, end in piece().stretches(4 * BLOCK):
        whole.write(first, values()[first:end], step=3)
    expected = whole.read(0, SIZE).float()
    assert torch.equal(halves(7 * BLOCK), expected)
    inside = halves(7 * BLOCK + 11)
    other = slice(7 * BLOCK, 8 * BLOCK) if format == "int8" else slice(0, 0)  # the block that is cut
    inside[other] = expected[other]
    assert torch.equal(inside, expected)


def test_eight_bits_are_fine_near_the_largest_of_a_block_and_never_zero_unsigned() -> None:
    signed, unsigned = make(piece(), "int8", "m"), make(piece(), "int8", "v", signed=False)
    signed.write(0, values())
    unsigned.write(0, values().abs())
    largest = torch.cat([part.abs().amax().expand(part.numel()) for part in values().split(BLOCK)])
    top = values().abs() > 0.1 * largest
    for moment, wanted in ((signed, values()), (unsigned, values().abs())):
        error = (moment.read(0, SIZE) - wanted).abs() / wanted.abs()
        assert error[top].max() < 0.08
    assert (unsigned.read(0, SIZE) > 0).all()
    assert (signed.read(0, SIZE).sign() * values().sign() >= 0).all()


def test_small_parameters_keep_float32_where_eight_bits_are_asked_for() -> None:
    small = make(piece(size=LEAST - 1), "int8", "m")
    assert small.num_bytes == 4 * (LEAST - 1)
    assert bytes_per_element("int8", LEAST - 1) == 4
