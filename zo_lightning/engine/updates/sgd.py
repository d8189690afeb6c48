"""SGD: along the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.updates.base import GroupSettings, UpdateRule


@dataclass(frozen=True)
class SGD(UpdateRule):
    """theta <- (1 - lr wd) theta - lr sum_j g_j z_j / n, with g_j the projected gradient of query j, |g_j| <= clip."""

    name = "sgd"

    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        return 1.0 - group.lr * group.weight_decay, tuple(-group.lr * g for g in self.projected(terms, group.eps))
