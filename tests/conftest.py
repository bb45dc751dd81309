"""What every test may rely on."""

import random
import signal

import numpy as np
import pytest
import torch

# Shells start background jobs with SIGINT ignored, and children inherit that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers every time and in any order of tests: a test that fails fails again."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
