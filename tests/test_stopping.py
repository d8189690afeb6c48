"""Two processes: one that raises outside of a step ends both; a checkpoint inside an accumulation window has what each of them measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_models import same
from ranks import run_starter
from transformers import BatchEncoding

from zo_lightning.engine.parallel.alike import sum_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_between_steps_leaves_nobody_waiting(rank: int, tmp_path: Path) -> None:
    """The other one is in a collective of Lightning's own, of which the meeting of the ranks knows nothing."""
    with pytest.raises(AssertionError, match=f"what rank {rank} says"):
        run_starter("stopping_worker.py", tmp_path, f"raises {rank}")


@pytest.mark.parametrize("parallel", ["data=2", "perturbation=2", "seeds=2"])
def test_a_checkpoint_inside_a_window_has_the_values_of_all_ranks(parallel: str, tmp_path: Path) -> None:
    run_starter("stopping_worker.py", tmp_path, parallel)
    for rank in range(2):
        whole, rest = torch.load(tmp_path / f"{parallel}.{rank}.pt", weights_only=True)
        assert same(whole, rest)


class Batch:
    """An object with tensors and with something of the process."""

    def __init__(self, x: torch.Tensor, name: str) -> None:
        self.x, self.name, self.itself = x, name, self


def test_batches_that_differ_have_other_numbers() -> None:
    x, array = torch.arange(6.0).view(2, 3), np.arange(6.0)
    pairs = [
        (x, x.flip(0)),
        ({"a": x}, {"b": x}),
        (BatchEncoding({"ids": x}), BatchEncoding({"ids": x.flip(1)})),
        (["one", "two"], ["two", "one"]),
        ([1, 2, 3], [1, 3, 2]),
        (("text", {"label": 1}), ("text", {"label": 2})),
        (array, array[::-1]),
        (np.float32(1.0), np.float32(2.0)),
        (Batch(x, "a"), Batch(x + 1, "a")),
        ([x, None], [None, x]),
    ]
    for one, other in pairs:
        assert sum_of(one) != sum_of(other)
        assert 0 < sum_of(one) < 1 << 53
    assert sum_of(Batch(x, "a")) == sum_of(Batch(x.clone(), "b"))
    assert sum_of({"ids": x}) == sum_of(BatchEncoding({"ids": x.clone()}))
    assert sum_of(object()) == 0
