"""Backprop: which parameters are trained by backpropagation, and by which first-order optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zo_lightning.engine.messages import check_number
from zo_lightning.engine.updates import TorchOptimizer

LR = 1e-4
"""Of the first-order optimizer where none is given."""


@dataclass(frozen=True, init=False)
class Backprop:
    r"""The last layers phi by backpropagation, the rest theta forward-only: hybrid training of ZO-Bench (arXiv 2402.11592).

    A step evaluates the loss l(theta_j, phi) at the points theta_j of the estimator anyway; where it does, it also differentiates,

        G = 1/m sum_j dl(theta_j, phi) / dphi,    over all m points, or over theta itself where that is among them (OneSided),

    and phi <- (1 - lr wd) phi moves by the first-order optimizer, fed with G, while theta moves as always, by the estimate of the points.
    For SPSA G is (dl(theta + eps z, phi) + dl(theta - eps z, phi)) / 2: the gradient at theta with a bias of O(eps^2), for the first
    order cancels. theta are constants there: nothing is recorded before the first operation that uses phi, and activations are kept from
    there on. phi has no noise. Micro-batches add up as losses do. A parameter that a loss does not depend on has the gradient 0. A step
    whose G is not finite is skipped, as one whose losses are not.

    Args:
        patterns: of fnmatch, on names without the longest common prefix of the model: "classifier*", or "blocks.11.* head*", or a list.
        lr: of the first-order optimizer alone; 1e-4 suits AdamW on blocks of a transformer, heads that are new take 1e-3. Schedulers
            scale it as they scale the lr of the group that a parameter is in (by lr / initial_lr).
        optimizer: a class of torch.optim that needs no closure, or its name; its state is that of these parameters.
        weight_decay: decoupled; None is that of the group that a parameter is in.
        max_norm: bound on the norm of G, over all its parameters; None for none.
        options: of the optimizer: betas=(0.9, 0.98).

    16-bit parameters are kept in float32 beside the model, whose values are those rounded to nearest.

    Raises ValueError for numbers out of range, and for what torch.optim refuses.
    """

    patterns: tuple[str, ...]
    lr: float
    rule: TorchOptimizer
    weight_decay: float | None
    max_norm: float | None

    def __init__(
        self,
        patterns: str | Sequence[str],
        *,
        lr: float = LR,
        optimizer: str | type[torch.optim.Optimizer] = "AdamW",
        weight_decay: float | None = None,
        max_norm: float | None = None,
        **options: Any,
    ) -> None:
        given = patterns.split() if isinstance(patterns, str) else patterns
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(each, str) and each for each in given):
            raise ValueError(
                f"Invalid backprop: {patterns!r}. Must be a pattern of parameter names such as 'classifier*', several of them, or a "
                "Backprop(...) of them."
            )
        check_number("lr of Backprop", lr, ">= 0", lambda x: x >= 0)
        if weight_decay is not None:
            check_number("weight_decay of Backprop", weight_decay, ">= 0, or None", lambda x: x >= 0)
        if max_norm is not None:
            check_number("max_norm of Backprop", max_norm, "> 0, or None", lambda x: x > 0)
        object.__setattr__(self, "patterns", tuple(given))
        object.__setattr__(self, "lr", lr)
        object.__setattr__(self, "rule", TorchOptimizer(optimizer, **options))
        object.__setattr__(self, "weight_decay", weight_decay)
        object.__setattr__(self, "max_norm", max_norm)


def as_backprop(given: str | Sequence[str] | Backprop | None) -> Backprop | None:
    """The object for an option; patterns alone have the defaults."""
    return given if given is None or isinstance(given, Backprop) else Backprop(given)
