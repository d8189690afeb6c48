"""Update rules: terms -> the step that is applied, theta <- decay * theta + sum_j c_j z(s_j)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators import Term


@dataclass(frozen=True)
class GroupSettings:
    """What one parameter group brings to a step: learning rate, perturbation scale, decoupled weight decay."""

    lr: float
    eps: float
    weight_decay: float


class UpdateRule(ABC):
    """A pure function of (terms, settings of the group); rules with state keep it as a function of past terms."""

    name: str

    @abstractmethod
    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        """(decay, (c_1, ..., c_n)) for one group, in float64."""


@dataclass(frozen=True)
class SGD(UpdateRule):
    """theta <- (1 - lr wd) theta - lr sum_j g_j z_j / n, with g_j the projected gradient of query j, |g_j| <= clip.

    `clip` bounds the projected gradient of each query: QZO (arXiv 2505.13430) clips at 100.
    """

    clip: float | None = None

    name = "sgd"

    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        return 1.0 - group.lr * group.weight_decay, tuple(-group.lr * g for g in self.projected(terms, group.eps))

    def projected(self, terms: Sequence[Term], eps: float) -> list[float]:
        """g_j / n for every term, clipped."""
        slopes = [term.slope / eps for term in terms]
        if self.clip is None:
            return slopes
        bound = self.clip / max(1, len(terms))
        return [max(-bound, min(bound, g)) for g in slopes]
