"""SPSA with SGD, from Spall 1992 and MeZO's Algorithm 1 (arXiv 2305.17333): z as whole tensors, all arithmetic in the weights' dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reference.noise import query_seed, whole

Weights = dict[str, Tensor]


@dataclass
class Settings:
    """The options of a run; `overrides` has those of single parameters by name."""

    lr: float
    eps: float = 1e-3
    weight_decay: float = 0.0
    noise: str = "rademacher"
    queries: int = 1
    seed: int = 0
    clip: float | None = None
    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mask: Callable[[int, Weights], Weights] | None = None
    """(step, theta) -> 1.0 for every weight that is trained, 0.0 for the others."""

    def of(self, name: str) -> tuple[float, float, float]:
        """(lr, eps, weight decay) of a parameter."""
        values = {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay, **self.overrides.get(name, {})}
        return values["lr"], values["eps"], values["weight_decay"]


def noise_like(theta: Weights, settings: Settings, step: int, query: int) -> Weights:
    """z of every parameter, in float64."""
    seed = query_seed(settings.seed, step, query)
    return {name: torch.from_numpy(whole(settings.noise, seed, name, w.numel())).view(w.shape) for name, w in theta.items()}


def spsa_step(theta: Weights, loss: Callable[[Weights], float], settings: Settings, step: int) -> tuple[Weights, list[float]]:
    """(theta after the step, the losses at +, -, +, -, ...).

    theta <- (1 - lr wd m) theta - lr / n sum_i clip((l_i+ - l_i-) / (2 eps)) m z_i, with the mask m
    """
    n = settings.queries
    masks = {name: torch.ones_like(w) for name, w in theta.items()} if settings.mask is None else settings.mask(step, theta)
    noises = [{name: masks[name] * z for name, z in noise_like(theta, settings, step, query).items()} for query in range(n)]
    losses = []
    for z in noises:
        for sign in (1.0, -1.0):
            losses.append(loss({name: w + sign * settings.of(name)[1] * z[name].to(w.dtype) for name, w in theta.items()}))
    updated = {}
    for name, w in theta.items():
        lr, eps, decay = settings.of(name)
        change = torch.zeros_like(w)
        for query, z in enumerate(noises):
            g = (losses[2 * query] - losses[2 * query + 1]) / (2 * eps)
            if settings.clip is not None:
                g = max(-settings.clip, min(settings.clip, g))
            change += z[name].to(w.dtype) * (-lr * g / n)
        updated[name] = w * (1 - lr * decay * masks[name]) + change
    return updated, losses
