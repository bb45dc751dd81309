"""Samples that are read in threads come in order, one batch ahead and no further."""

from __future__ import annotations

import threading

import pytest

from trainer.data.read_ahead import batches, read_ahead


@pytest.mark.parametrize(("samples", "size"), [(range(3, 20), 4), (range(0), 4), (range(5, 9), 4), (range(2), 100)])
def test_every_sample_comes_once_and_in_order(samples: range, size: int) -> None:
    found = list(read_ahead(batches(samples, size), lambda sample: sample * 10, threads=3))
    assert [value for batch in found for value in batch] == [sample * 10 for sample in samples]
    assert all(len(batch) == size for batch in found[:-1]) and all(found)


def test_the_next_batch_is_read_meanwhile_and_no_other() -> None:
    seen: set[int] = set()
    fourth = threading.Event()

    def read(sample: int) -> int:
        seen.add(sample)
        if sample == 3:
            fourth.set()
        return sample

    reading = read_ahead(batches(range(8), 2), read, threads=2)
    next(reading)
    assert fourth.wait(30)  # the second batch, which nobody has asked for yet
    assert seen == {0, 1, 2, 3}
    assert list(reading) == [[2, 3], [4, 5], [6, 7]]


def test_an_error_is_raised_where_its_batch_is_due() -> None:
    def read(sample: int) -> int:
        if sample == 3:
            raise ValueError("sample 3")
        return sample

    reading = read_ahead(batches(range(6), 2), read, threads=2)
    assert next(reading) == [0, 1]
    with pytest.raises(ValueError, match="sample 3"):
        next(reading)
