"""A signal to one rank stops all of them after the same step."""

import os
import signal
import time

import pytest

from tests.support.forked_ranks import run_ranks
from trainer.core.distributed import rank
from trainer.runtime.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_all_ranks_agree_after_the_same_step(number: signal.Signals) -> None:
    def work() -> tuple[int, str | None, object]:
        before = signal.getsignal(number)
        with StopSignals() as signals:
            for step in range(10):
                if rank() == 1 and step == 4:
                    os.kill(os.getpid(), number)
                name = signals.agreed()
                if name:
                    break
        return step, name, signal.getsignal(number) == before

    assert run_ranks(work, 3) == [(4, number.name, True)] * 3


def test_the_second_ctrl_c_stops_at_once() -> None:
    child = os.fork()
    if child == 0:
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(
                    os.getpid(), signal.SIGTERM
                )  # launchers send it after the terminal's Ctrl-C: that is no second one
                assert signals.agreed()
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_a_ctrl_c_is_called_by_its_name_whatever_launchers_send_after_it() -> None:
    def work() -> str | None:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
            return signals.agreed()

    assert run_ranks(work, 2) == ["SIGINT"] * 2


def test_one_process_needs_no_peers() -> None:
    with StopSignals() as signals:
        assert signals.agreed() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.agreed() == "SIGUSR1"
