"""What every test runs under: offline, and one torch thread per pytest-xdist worker so that two workers fill two cores."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the subprocesses that tests start

    import torch

    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as at a terminal: what runs in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
