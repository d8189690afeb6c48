"""MeZO's Algorithm 1 as a plain loop: the yardstick that step_cost.py runs beside the engine.

Written from the paper (Malladi et al. 2023, arXiv 2305.17333, Algorithm 1): z is drawn anew from the step's seed by `torch.normal`, tensor
by tensor, in each of four sweeps over the weights: theta + eps z, theta - eps z, back to theta, and the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MeZO:
    """One query a step, Gaussian z, no weight decay."""

    def __init__(self, model: nn.Module, lr: float = 1e-6, eps: float = 1e-3) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.eps = lr, eps
        self.seeds = torch.Generator().manual_seed(0)

    def move(self, seed: int, scale: float) -> None:
        """theta <- theta + scale * z(seed)."""
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
            p.add_(scale * z)

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor]) -> float:
        """One step of Algorithm 1; the projected gradient."""
        seed = int(torch.randint(2**31, (), generator=self.seeds))
        self.move(seed, self.eps)
        plus = float(loss())
        self.move(seed, -2 * self.eps)
        minus = float(loss())
        self.move(seed, self.eps)
        projected = (plus - minus) / (2 * self.eps)
        self.move(seed, -self.lr * projected)
        return projected
