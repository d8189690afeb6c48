"""Rules that need the estimate itself, one tensor after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
        estimates = tuple((1.0 - group.lr * group.weight_decay, tuple(self.rule.projected(terms, group.eps))) for group in settings)
        through = _Through(self, tuple(settings), tuple(terms))
        return Change(tuple(term.seed for term in terms), estimates, rounding, through)

    def learn(self, key: int, terms: Sequence[Term], eps: float, direction: Callable[[int], Tensor]) -> None:
        """The tensor of a parameter's key was moved by these terms; `direction(j)` is z_j, 0 outside of the mask, and may be written to."""

    @abstractmethod
    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        """Move the tensor of a parameter's key, in place; `estimate` has its shape and dtype and may be written to."""


@dataclass(frozen=True)
class _Through:
    """What `apply_through` asks."""

    state: DenseState
    settings: tuple[GroupSettings, ...]
    terms: tuple[Term, ...]

    def moves(self, group: int) -> bool:
        return self.settings[group].lr > 0 or self.state.rule.remembers

    def move(self, key: int, group: int, theta: Tensor, estimate: Tensor, direction: Callable[[int], Tensor]) -> None:
        self.state.move(key, theta, estimate, self.settings[group].lr)
        self.state.learn(key, self.terms, self.settings[group].eps, direction)
