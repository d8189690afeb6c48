"""Conservative: a step is made only where it, or its opposite, is better than none."""

from __future__ import annotations

from dataclasses import dataclass

from zo_lightning.engine.estimators.base import Estimator
from zo_lightning.engine.estimators.spsa import SPSA


@dataclass(frozen=True)
class Conservative(SPSA):
    """ZO-SGD-Cons (ZO-Bench, arXiv 2402.11592): the best of theta - u, theta + u and theta, for the step u that SPSA would make.

    u = lr g with SPSA's g. The micro-batches of the step are evaluated three times more, at these points, which costs 2n + 3 evaluations;
    the objective on the data of a step does not grow by it, before weight decay and the rounding of 16-bit weights. All groups need the
    same lr / eps**2; weight decay is that of lr.
    """

    name = "conservative"
    along = (1.0, -1.0, 0.0)

    def times(self, processes: int) -> Conservative:
        return Estimator.times(self, processes)  # type: ignore[return-value]  # it raises
