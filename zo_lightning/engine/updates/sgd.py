"""SGD: along the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.noise import Change
from zo_lightning.engine.updates.base import GroupSettings, RuleState, UpdateRule


@dataclass(frozen=True)
class SGD(UpdateRule):
    """theta <- (1 - lr wd) theta - lr sum_j g_j z_j / n, with g_j the projected gradient of query j, |g_j| <= clip."""

    name = "sgd"

    def begin(self) -> RuleState:
        return _State(self)

    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        """(decay, (c_1, ..., c_n)) for one group: theta <- decay theta + sum_j c_j z_j."""
        return 1.0 - group.lr * group.weight_decay, tuple(-group.lr * g for g in self.projected(terms, group.eps))


class _State(RuleState):
    """Nothing is remembered."""

    def __init__(self, rule: SGD) -> None:
        self._rule = rule

    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        return Change(tuple(term.seed for term in terms), tuple(self._rule.step(terms, group) for group in settings), rounding)
