"""What every test starts from: the same seeds and thread count, nothing said yet, no network."""

from __future__ import annotations

import os

# Before torch and transformers are imported, and for the processes that tests start. Two threads whatever the machine:
# sums over threads round differently with their number.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch

from zo_lightning.engine import messages


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Reset what one test could hand to the next."""
    messages.reset()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
