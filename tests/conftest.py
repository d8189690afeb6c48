"""What every test starts from: the same seeds and thread count, nothing said yet, no network."""

from __future__ import annotations

import os

# Before torch and transformers are imported, and for the processes that tests start. One thread whatever the machine,
# as in the processes that tests compare with: sums over threads round differently with their number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several test processes share the cores
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from zo_lightning.engine import messages


@pytest.hookimpl(tryfirst=True)
@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what other processes wrote for their module run in one process of pytest-xdist, or each would start its own."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            made = item._fixtureinfo.name2fixturedefs.values()
            if any(one.scope == "module" and "tmp_path_factory" in one.argnames for definitions in made for one in definitions):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Reset what one test could hand to the next."""
    messages.reset()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # left by Lightning's seed_everything, read by its samplers
        os.environ.pop(name, None)
