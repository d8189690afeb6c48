"""Momentum: the last steps' estimates, drawn again from their seeds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.messages import check_count, check_number
from zo_lightning.engine.noise import Change
from zo_lightning.engine.updates.base import GroupSettings, RuleState, UpdateRule


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """theta <- (1 - lr wd) theta - lr sum_(k < K) beta^k g_(t-k), with the estimates g of the last K steps: heavy ball without memory.

    The buffer of torch.optim.SGD(momentum=beta) is that sum for K without end. What is left out of it weighs beta^K of the whole (with the
    defaults 12 %). Nothing of the weights' size is kept: seeds and projected gradients are, and each step draws the noise of K steps, so
    that an update takes K times as long. `TorchOptimizer("SGD", momentum=beta)` keeps the buffer instead, for small trainable sets.

    An estimate moves weights by lr / (1 - beta) of itself in the end: take 1 - beta of SGD's lr. With a mask, earlier directions are those
    of the weights that are trained now. Where a mask is made anew, or parameters are frozen or unfrozen, the sum begins anew.

    Args:
        beta: in [0, 1). window: K, at least 1.

    Raises ValueError for others. Polyak 1964; ZO-SGD-MMT in ZO-Bench, arXiv 2402.11592, keeps the buffer.
    """

    beta: float = 0.9
    window: int = 20

    name = "momentum"
    remembers = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, ">= 0 and < 1", lambda x: 0 <= x < 1)
        check_count("window", self.window, "the steps whose estimates are summed")

    def begin(self) -> RuleState:
        return _Window(self)


class _Window(RuleState):
    """The last steps, newest first: their seeds, and the projected gradients of each group."""

    rule: Momentum

    def __init__(self, rule: Momentum) -> None:
        super().__init__(rule)
        self._steps: deque[tuple[tuple[int, ...], list[list[float]]]] = deque(maxlen=rule.window)
        self._keys: Set[int] | None = None

    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        own = [self.rule.projected(terms, group.eps) for group in settings]
        self._steps.appendleft((tuple(term.seed for term in terms), own))
        steps = tuple((1.0 - group.lr * group.weight_decay, self._coefficients(i, group.lr)) for i, group in enumerate(settings))
        return Change(tuple(seed for seeds, _ in self._steps for seed in seeds), steps, rounding)

    def _coefficients(self, group: int, lr: float) -> tuple[float, ...]:
        """Groups that came later have no part in the steps before."""
        found: list[float] = []
        for ago, (seeds, projected) in enumerate(self._steps):
            then = projected[group] if group < len(projected) else [0.0] * len(seeds)
            found += [-lr * self.rule.beta**ago * g for g in then]
        return tuple(found)

    def train(self, keys: Set[int]) -> None:
        if self._keys is not None and keys != self._keys:
            self.clear()
        self._keys = keys

    def clear(self) -> None:
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        keys = None if self._keys is None else sorted(self._keys)
        return {"keys": keys, "steps": [[list(seeds), [list(own) for own in projected]] for seeds, projected in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        newest = state["steps"][: self.rule.window]
        self._steps = deque(((tuple(seeds), projected) for seeds, projected in newest), maxlen=self.rule.window)
        self._keys = None if state["keys"] is None else frozenset(state["keys"])
