"""What a step measured and did: the records that hosts and callbacks read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.window import Window

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer


@dataclass(frozen=True)
class Estimate:
    """One micro-batch: `output` is what the closure returned at the first point, `loss` the float64 mean of weight * loss over points.

    Both are None where the closure gave no loss.
    """

    output: Any
    loss: Tensor | None


@dataclass(frozen=True)
class StepReport:
    """One step. Losses are in the objective's unit, averaged over ranks; `projected_grad` is (l+ - l-) / (2 eps), mean over queries."""

    step: int
    values: tuple[float, ...]
    loss: float
    loss_plus: float
    loss_minus: float
    projected_grad: float
    eps: float
    lr: float
    forward_passes: int
    """Evaluations of the closure since the run began."""
    skipped: bool
    """A value was not finite: no update."""
    zero_difference: bool
    """All differences were exactly zero: nothing but weight decay was applied."""
    resolution: float
    """|l+ - l-| in units of the float32 spacing at the loss: below some tens the difference is rounding."""
    seconds: float
    """Wall time of the step's evaluations and update."""
    score: float | None = None
    """What the objective measured, in its own unit, mean over points; None without an objective, and for recalled steps."""


def float32_spacing(value: float) -> float:
    """The distance from |value| to the next float32."""
    if not math.isfinite(value):
        return math.nan
    return 2.0 ** (max(math.frexp(abs(value))[1], -125) - 24)


def make_report(
    optimizer: ZOOptimizer,
    window: Window,
    values: Sequence[float],
    scores: Sequence[float],
    terms: Sequence[Term],
    lr: float,
    seconds: float,
) -> StepReport:
    """Of a step whose points had these values; without terms it was skipped."""
    plus, minus = optimizer.estimator.sides(values)
    return StepReport(
        step=optimizer.steps,
        values=tuple(values),
        loss=optimizer.estimator.loss(values) if terms else math.nan,
        loss_plus=plus,
        loss_minus=minus,
        projected_grad=math.fsum(optimizer.rule.projected(terms, window.eps[0])) if terms else math.nan,
        eps=window.eps[0],
        lr=lr,
        forward_passes=optimizer.forward_passes,
        skipped=not terms,
        zero_difference=bool(terms) and not any(term.slope for term in terms),
        resolution=optimizer.estimator.difference(values) / float32_spacing(max(abs(plus), abs(minus))) if terms else math.nan,
        seconds=seconds,
        score=math.fsum(scores) / len(scores) if scores else None,
    )
