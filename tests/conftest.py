"""What every test runs under: offline, and one torch thread per pytest-xdist worker so that two workers fill two cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the subprocesses that tests start

    import torch

    torch.set_num_threads(1)
