"""Masks as whole tensors, from the papers' definitions: sorted weights, lots, and names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def by_size(theta: Tensor, count: int, largest: bool) -> Callable[[Tensor], Tensor]:
    """The mask of the `count` smallest (largest) absolute values, as a function of the weights at a later step."""
    size = theta.detach().abs().double().reshape(-1).numpy()
    order = np.argsort(-size if largest else size, kind="stable")[:count]
    if not count:
        return lambda later: torch.zeros(later.shape, dtype=torch.bool)
    bound = size[order[-1]]
    equal = [i for i in order if size[i] == bound]
    last = max(equal) if len(equal) < (size == bound).sum() else len(size) - 1
    if 4 * len(equal) > count:  # kept until the next refresh
        chosen = torch.zeros(theta.shape, dtype=torch.bool)
        chosen.view(-1)[torch.from_numpy(order.copy())] = True
        return lambda later: chosen

    def at(later: Tensor) -> Tensor:
        now = later.detach().abs().double().reshape(-1).numpy()
        inside = (now > bound if largest else now < bound) | ((now == bound) & (np.arange(len(now)) <= last))
        return torch.from_numpy(inside).view(later.shape)

    return at


class BySize:
    """SmallWeights and LargeWeights: thresholds at every `refresh` steps; membership at every step, or with them (`listed`)."""

    def __init__(self, density: float, largest: bool = False, refresh: int | None = None, listed: bool = False) -> None:
        self.density, self.largest, self.refresh, self.listed = density, largest, refresh, listed
        self.masks: dict[str, Callable[[Tensor], Tensor]] = {}

    def __call__(self, step: int, theta: Weights) -> Weights:
        if not self.masks or (self.refresh and step % self.refresh == 0):
            self.masks = {name: by_size(w, round(self.density * w.numel()), self.largest) for name, w in theta.items()}
            if self.listed:
                fixed = {name: mask(theta[name]) for name, mask in self.masks.items()}
                self.masks = {name: lambda later, mask=mask: mask for name, mask in fixed.items()}  # type: ignore[misc]
        return {name: self.masks[name](w).to(w.dtype) for name, w in theta.items()}
