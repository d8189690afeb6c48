"""weights="exact" writes all vectors of a large model in one go; each unit still has its own only while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import distance, snapshot
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.residency.exact import KEEP_AFTER


class Wide(nn.Module):
    """A large table, blocks with biases and gains; looks between the blocks whether every parameter is where it was."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8192, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.norm = nn.LayerNorm(16)
        self.fails = False
        self.to(dtype)
        self.home = [p.data_ptr() for p in self.parameters()]
        self.back: list[bool] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
            self.back.append([p.data_ptr() for p in self.parameters()] == self.home)
            if self.fails:
                raise ArithmeticError
        return self.norm(x)


def run(weights: str, dtype: torch.dtype = torch.float32, forwards: int = 1, **options: Any) -> tuple[Wide, ZOOptimizer, list[float]]:
    model = Wide(dtype)
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2, weights=weights, safeguard=None, **options)
    ids = torch.arange(6)
    losses: list[float] = []
    for _ in range(3):
        optimizer.step(lambda: torch.stack([model(ids).float().pow(2).mean() for _ in range(forwards)]).mean())
        losses += optimizer.report.values
    return model, optimizer, losses


@pytest.mark.parametrize("forwards", [1, KEEP_AFTER + 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_weights_are_those_of_a_copy(dtype: torch.dtype, forwards: int) -> None:
    model, optimizer, losses = run("exact", dtype, forwards)
    other, _, expected = run("copy", dtype, forwards)
    residency: Any = optimizer.residency
    assert {p.name for p in residency._vectors} == {name for name, p in model.named_parameters() if p.dim() == 1}
    assert losses == expected
    assert distance(snapshot(model), snapshot(other)) == 0


def test_between_the_blocks_the_vectors_are_back() -> None:
    model, _, _ = run("exact")
    assert model.back == [True] * 21  # three blocks in a watched pass and in two evaluations of three steps


def test_an_exception_gives_everything_back() -> None:
    model, optimizer, _ = run("exact")
    before, held = snapshot(model), optimizer.residency.scratch_bytes()  # type: ignore[attr-defined]
    model.fails = True
    with pytest.raises(ArithmeticError):
        optimizer.step(lambda: model(torch.arange(6)).pow(2).mean())
    model.fails = False
    assert distance(before, snapshot(model)) == 0
    optimizer.step(lambda: model(torch.arange(6)).pow(2).mean())
    assert optimizer.residency.scratch_bytes() == held  # type: ignore[attr-defined]


def test_the_memory_is_that_of_the_largest_unit_and_the_vectors() -> None:
    model, optimizer, _ = run("exact")
    vectors = [p for p in model.parameters() if p.dim() == 1]
    rounded = sum(p.nbytes + 64 for p in vectors)
    assert optimizer.residency.scratch_bytes() <= model.embed.weight.nbytes + rounded  # type: ignore[attr-defined]
    assert 64 * sum(p.nbytes for p in vectors) <= model.embed.weight.nbytes
