"""ZO-SVRG (arXiv 1805.10367) over whole tensors: z is materialised, and the anchor is a copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.spsa import Settings, noise_like
from reference.updates import Move

Weights = dict[str, Tensor]
Loss = Callable[[int, Weights], float]
"""Of the batch of a step."""


@dataclass
class Anchor:
    """refresh, anchor: K and A. `copied` False is the known bug: theta~ is theta itself, and moves with it."""

    refresh: int
    anchor: int
    copied: bool = True


def estimates(theta: Weights, loss: Loss, settings: Settings, step: int, queries: int, drawn: int) -> Weights:
    """1/n sum_(i < n) (l(theta + eps z_i) - l(theta - eps z_i)) / (2 eps) z_i on the batch of a step, with the noise of another."""
    found = {name: torch.zeros_like(w) for name, w in theta.items()}
    masks = settings.mask(step, theta) if settings.mask is not None else {name: torch.ones_like(w) for name, w in theta.items()}
    for query in range(queries):
        z = {name: (masks[name] * z).to(theta[name].dtype) for name, z in noise_like(theta, settings, drawn, query).items()}
        plus, minus = (loss(step, {name: w + side * settings.eps * z[name] for name, w in theta.items()}) for side in (1.0, -1.0))
        for name, total in found.items():
            total += (plus - minus) / (2 * settings.eps * queries) * z[name]
    return found


def run(theta: Weights, loss: Loss, settings: Settings, how: Anchor, steps: int, move: Move | None = None) -> list[Weights]:
    """Train `theta` in place; the estimate of every step, none of those that move nothing."""
    made, anchor, measured = [], theta, list[Weights]()
    for step in range(steps):
        within = step % how.refresh
        if within == 0:
            anchor, measured = ({name: w.clone() for name, w in theta.items()} if how.copied else theta), []
        if within < how.anchor:
            measured.append(estimates(anchor, loss, settings, step, 2 * settings.queries, step - within))
            if within < how.anchor - 1:
                continue
        mean = {name: sum((own[name] for own in measured), start=torch.zeros_like(w)) / how.anchor for name, w in theta.items()}
        g = mean
        if within >= how.anchor:
            here, there = (estimates(at, loss, settings, step, settings.queries, step) for at in (theta, anchor))
            g = {name: here[name] - there[name] + mean[name] for name in theta}
        made.append(g)
        if move is not None:
            move(theta, g, settings)
            continue
        for name, w in theta.items():
            w -= settings.lr * g[name]
    return made
