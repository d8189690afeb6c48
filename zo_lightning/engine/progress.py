"""What a run remembers of its steps beside the weights: the state of its estimator and that of its update rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from zo_lightning.engine.estimators import Displacement, Estimator, Term
from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.updates import GroupSettings, UpdateRule


class Progress:
    """Both are functions of the recorded values and settings of the steps so far: training, catching up and replay step it alike."""

    def __init__(self, estimator: Estimator, rule: UpdateRule) -> None:
        self.rule, self._rule = rule.begin(), rule
        self._keys: Set[int] | None = None
        self.estimate_by(estimator)

    def estimate_by(self, estimator: Estimator) -> None:
        """Begin anew with an estimator."""
        self.estimator, self._estimator = estimator.begin(), estimator

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """The displacements to evaluate in the next step; `seeds(i)` is the seed of its query i."""
        if self._keys is not None:
            self.rule.train(self._keys)  # a state that was loaded since may be of others
        return self.estimator.points(seeds)

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """The terms that the values at these points, which are finite, stand for."""
        return self.estimator.terms(points, values)

    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        """The change of a step with these terms, which is remembered from now on; none where the step only measures."""
        nothing = Change((), ((1.0, ()),) * len(settings), rounding)
        change = nothing if self.estimator.measures else self.rule.change(terms, settings, rounding)
        self.estimator.remember(terms, change, settings)
        return change

    def noise(self, noise: Noise) -> Noise:
        """The noise of evaluations and steps, in which a rule may have a part."""
        return self.rule.noise(noise)

    def train(self, keys: Set[int]) -> None:
        """These parameters are trained from now on; what was measured of others is no anchor of theirs."""
        if self._keys is not None and keys != self._keys:
            self.estimator.clear()
        self._keys = keys
        self.rule.train(keys)

    def clear(self) -> None:
        """Forget all: other weights are trained from now on, or a step log begins."""
        self.estimator.clear()
        self.rule.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, and of which rule and estimator it is."""
        estimator = {"of": repr(self._estimator), "state": self.estimator.state_dict()}
        return {"update": {"name": self._rule.kind, "state": self.rule.state_dict()}, "estimator": estimator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. ValueError, with nothing changed, where another rule, or estimator, remembers it."""
        update, estimator = state["update"], state["estimator"]
        if update["name"] != self._rule.kind:
            raise ValueError(
                f"update={self._rule.kind!r}, but the state was saved with update={update['name']!r}. Resume with the same rule."
            )
        if self._estimator.remembers and estimator["state"] and estimator["of"] != repr(self._estimator):
            raise ValueError(
                f"estimator={self._estimator!r}, but the state was saved between two steps that {estimator['of']} makes together. Resume "
                "with the same estimator."
            )
        self.rule.load_state_dict(update["state"])
        self.estimator.load_state_dict(estimator["state"])
