"""weights="exact" where a module hands out a view of its weight, which others read when it has ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer


class Table(nn.Module):
    """Hands out a part of its weight in some form."""

    def __init__(self, view: Callable[[Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.view = view

    def forward(self) -> Tensor:
        return self.view(self.weight)


class Reader(nn.Module):
    """Blocks that read what the table handed out before them; with `keeps` it is an attribute meanwhile."""

    def __init__(self, table: Table, combine: Callable[[Tensor, Tensor], Tensor], keeps: bool = False) -> None:
        super().__init__()
        self.table, self.combine, self.keeps = table, combine, keeps
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        held = self.table()
        self.held = held if self.keeps else None
        x = self.first(x)
        for block in self.blocks:
            x = block(self.combine(x, held if self.held is None else self.held))
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "slice": lambda: Reader(Table(lambda w: w[:5], 16, 8), torch.add),
    "slice with offset": lambda: Reader(Table(lambda w: w[3:8], 16, 8), torch.add),
    "gate": lambda: Reader(Table(lambda w: w.view(1, 8), 8), torch.mul),
    "transpose": lambda: Reader(Table(lambda w: w.t(), 8, 8), torch.matmul),
    "expand": lambda: Reader(Table(lambda w: w.expand(5, 8), 1, 8), torch.add),
    "attribute": lambda: Reader(Table(lambda w: w[:5], 16, 8), torch.add, keeps=True),
    "the weight itself": lambda: Reader(Table(lambda w: w, 8, 8), torch.matmul),
}


def values(make: Callable[[], nn.Module], weights: str, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = make().to(dtype)
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2, weights=weights, safeguard=None)
    x = torch.randn(5, 8).to(dtype)
    losses: list[float] = []
    for _ in range(3):
        optimizer.step(lambda: model(x).float().pow(2).mean())
        losses += optimizer.report.values
    return losses, model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_weights_are_those_of_a_copy(name: str, dtype: torch.dtype) -> None:
    losses, state = values(MODELS[name], "exact", dtype)
    expected, others = values(MODELS[name], "copy", dtype)
    assert losses == expected
    assert all(torch.equal(tensor, others[key]) for key, tensor in state.items())


def test_weights_that_lie_in_one_storage_are_told_apart() -> None:
    def make() -> nn.Module:
        model = Reader(Table(lambda w: w[:5], 16, 8), torch.add)
        whole = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        at = 0
        for p in model.parameters():
            p.data = whole[at : at + p.numel()].view(p.shape)
            at += p.numel()
        return model

    torch.manual_seed(0)
    model = make()
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact", safeguard=None)
    optimizer.step(lambda: model(torch.randn(5, 8)).pow(2).mean())
    units = {p.name: unit.module for unit in optimizer.residency.units for p in unit.parameters}  # type: ignore[attr-defined]
    assert units["blocks.1.0.weight"] is model.blocks[1]  # type: ignore[index]
    assert units["table.weight"] is model
    assert values(make, "exact", torch.float32)[0] == values(make, "copy", torch.float32)[0]
