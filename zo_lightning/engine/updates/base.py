"""What an update rule is: from the terms of a step, and what it remembers of earlier ones, to the change that is made."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zo_lightning.engine.estimators import Estimator, Term
from zo_lightning.engine.messages import check_number
from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.parameters import Trained


@dataclass(frozen=True)
class GroupSettings:
    """What one parameter group brings to a step: learning rate, perturbation scale, decoupled weight decay."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class UpdateRule(ABC):  # a base that is no dataclass: command lines (jsonargparse) then take any class of it
    """The options of a rule, which step logs record. A rule of the terms of the step alone has a `step`, others a state that they `begin`.

    `clip` bounds the absolute projected gradient of each query: QZO (arXiv 2505.13430) clips at 100. ValueError for one that is not > 0.
    """

    clip: float | None = field(default=None, kw_only=True)

    name: ClassVar[str]
    remembers: ClassVar[bool] = False
    """Whether a step depends on terms of earlier ones."""
    dense: ClassVar[bool] = False
    """Whether the estimate is materialised: memory for it, and float32 values of 16-bit weights."""
    shards: ClassVar[bool] = True
    """Whether a rank can do it to its part of a parameter."""

    rescales: ClassVar[bool] = False
    """Whether the noise of weights has sizes that the rule learns."""

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_number("clip", self.clip, "> 0, or None", lambda x: x > 0)

    @property
    def kind(self) -> str:
        """What its state can be taken over by: the name, and of a family which one."""
        return self.name

    def begin(self) -> RuleState:
        """The state of a run that has made no step."""
        return RuleState(self)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """What is kept of a trained tensor of a shape, in bytes."""
        return 0

    def measured_by(self, estimator: Estimator) -> Estimator:
        """The estimator that measures what the rule needs. ValueError where this one can't."""
        return estimator

    def check(self, trained: Sequence[Trained]) -> None:  # noqa: B027 (most have nothing to say)
        """ValueError where it can't train these parameters."""

    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        """(decay, (c_1, ..., c_n)) for one group, in float64: theta <- decay theta + sum_j c_j z_j."""
        raise NotImplementedError(f"{type(self).__name__} has neither a step nor a state of its own.")

    def projected(self, terms: Sequence[Term], eps: float) -> list[float]:
        """g_j / n for every term, clipped: the estimate is sum_j g_j / n z_j."""
        slopes = [term.slope / eps for term in terms]
        if self.clip is None:
            return slopes
        bound = self.clip / max(1, len(terms))
        return [max(-bound, min(bound, g)) for g in slopes]


class RuleState:
    """What a rule remembers, a function of the terms so far: whoever has these, rebuilds it. This one remembers nothing."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule

    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        """The change of a step; `rounding` is the seed of its stochastic rounding. From now on its terms are remembered."""
        return Change(tuple(term.seed for term in terms), tuple(self.rule.step(terms, group) for group in settings), rounding)

    def noise(self, noise: Noise) -> Noise:
        """The noise of evaluations and steps, where the rule has a part in it."""
        return noise

    def train(self, keys: Set[int]) -> None:
        """These parameters are trained from now on."""

    def clear(self) -> None:
        """Forget all: other weights are trained from now on, or a step log begins."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
