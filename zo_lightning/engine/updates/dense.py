"""Rules that need the estimate itself, one tensor after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.noise import Change
from zo_lightning.engine.updates.base import GroupSettings, RuleState, UpdateRule


@dataclass(frozen=True)
class Dense(UpdateRule, ABC):
    """A function of g = sum_j g_j / n z_j, materialised in float32 (float64 for such weights) for one tensor at a time.

    theta decays by 1 - lr wd first. 16-bit weights are kept in float32 beside the model. With a `Scale` it is theta / unit that is moved;
    where there is a mask, g is 0 outside of it, and what is outside stays as it is.
    """

    dense = True

    @abstractmethod
    def begin(self) -> DenseState:
        """The state of a run that has made no step."""


class DenseState(RuleState, ABC):
    """What a rule remembers of each tensor."""

    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        estimates = tuple((1.0 - group.lr * group.weight_decay, tuple(self._rule.projected(terms, group.eps))) for group in settings)
        through = _Through(self, tuple(group.lr for group in settings))
        return Change(tuple(term.seed for term in terms), estimates, rounding, through)

    @abstractmethod
    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        """Move the tensor of a parameter's key, in place; `estimate` has its shape and dtype and may be written to."""


@dataclass(frozen=True)
class _Through:
    """What `apply_through` asks."""

    state: DenseState
    lr: tuple[float, ...]

    def moves(self, group: int) -> bool:
        return self.lr[group] > 0

    def move(self, key: int, group: int, theta: Tensor, estimate: Tensor) -> None:
        self.state.move(key, theta, estimate, self.lr[group])
