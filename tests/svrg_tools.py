"""For tests of SVRG: a regression in batches, a loop, and where an anchor is."""

from __future__ import annotations

from typing import Any

import torch
from engine_models import mean_square, mlp, regression, snapshot
from torch import Tensor, nn
from torch.func import functional_call

from zo_lightning.engine import SVRG, ZOOptimizer
from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Item, sweep

EPS, LR = 1e-2, 2e-2
X, Y = regression(rows=64)
Weights = dict[str, Tensor]


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Another quarter of the rows in every step."""
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]
    return X[rows].to(dtype), Y[rows].to(dtype)


def error(step: int, theta: Weights) -> float:
    x, y = batch(step)
    return float((functional_call(mlp(), theta, (x,)) - y).square().mean())


def of(estimator: SVRG, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, ZOOptimizer]:
    model = mlp() if model is None else model
    return model, ZOOptimizer(model, **{"lr": LR, "eps": EPS, "estimator": estimator, **options})


def steps(model: nn.Module, optimizer: ZOOptimizer, count: int, first: int = 0, pieces: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + count):
        x, y = batch(step, dtype)
        for rows in torch.arange(len(x)).chunk(pieces):
            optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
        optimizer.apply()


def of_anchor(optimizer: ZOOptimizer) -> int:
    """How many steps were made with the anchor at hand; 0 behind the last one."""
    return int(optimizer.progress.estimator.state_dict().get("steps", 0))


def ended(model: nn.Module, optimizer: ZOOptimizer) -> Weights:
    with optimizer.settled():
        return snapshot(model)


def displaced(optimizer: ZOOptimizer, point: Displacement) -> Weights:
    """What a residency would write for a point."""
    found = {}
    for p in optimizer.residency.trained:
        out = torch.empty_like(p.tensor)
        eps = optimizer.param_groups[p.group]["eps"]
        item = Item(out, p.tensor.detach(), p.key, 1.0, tuple(multiple * eps for _, multiple in point))
        sweep([item], [seed for seed, _ in point], optimizer.noise, rounding=1)
        found[p.name] = out
    return found
