"""Update rules over whole tensors: the estimate is materialised, and torch.optim, or the paper's formula, moves the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reference.spsa import Settings, noise_like

Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]
Move = Callable[[Weights, Weights, Settings], None]


def estimate(theta: Weights, loss: Loss, settings: Settings, step: int) -> Weights:
    """g = sum_i (l_i+ - l_i-) / (2 n eps) z_i, summed in the order of the queries."""
    noises = [{name: z.to(theta[name].dtype) for name, z in noise_like(theta, settings, step, i).items()} for i in range(settings.queries)]
    found = {name: torch.zeros_like(w) for name, w in theta.items()}
    for z in noises:
        plus, minus = (loss({name: w + side * settings.eps * z[name] for name, w in theta.items()}) for side in (1.0, -1.0))
        g = (plus - minus) / (2 * settings.queries) / settings.eps
        for name, total in found.items():
            total += g * z[name]
    return found


def sign(theta: Weights, g: Weights, settings: Settings) -> None:
    for name, w in theta.items():
        w -= settings.lr * g[name].sign()


def torch_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Move:
    """One optimizer of torch for all weights, which are the same tensors in every step."""
    made: list[torch.optim.Optimizer] = []

    def move(theta: Weights, g: Weights, settings: Settings) -> None:
        if not made:
            made.append(make(list(theta.values())))
        for name, w in theta.items():
            w.grad = g[name]
        made[0].step()

    return move


def window(beta: float, length: int) -> Move:
    """theta <- theta - lr sum_(k < K) beta^k g_(t-k), with the last K estimates kept as tensors."""
    before: list[Weights] = []

    def move(theta: Weights, g: Weights, settings: Settings) -> None:
        before.insert(0, g)
        del before[length:]
        for name, w in theta.items():
            w -= settings.lr * sum((beta**ago * then[name] for ago, then in enumerate(before)), start=torch.zeros_like(w))

    return move


def run(theta: Weights, loss: Loss, settings: Settings, move: Move, steps: int) -> None:
    """Train `theta` in place, with decoupled weight decay."""
    with torch.no_grad():
        for step in range(steps):
            g = estimate(theta, loss, settings, step)
            for w in theta.values():
                w *= 1 - settings.lr * settings.weight_decay
            move(theta, g, settings)
