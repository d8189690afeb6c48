"""What an update rule is: from the terms of a step, and what it remembers of earlier ones, to the change that is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.messages import check_number
from zo_lightning.engine.noise import Change


@dataclass(frozen=True)
class GroupSettings:
    """What one parameter group brings to a step: learning rate, perturbation scale, decoupled weight decay."""

    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class UpdateRule(ABC):
    """The options of a rule, which step logs record; `begin` gives what changes from step to step.

    `clip` bounds the absolute projected gradient of each query: QZO (arXiv 2505.13430) clips at 100. ValueError for one that is not > 0.
    """

    clip: float | None = None

    name: ClassVar[str]
    remembers: ClassVar[bool] = False
    """Whether a step depends on terms of earlier ones."""
    dense: ClassVar[bool] = False
    """Whether the estimate is materialised: memory for it, and float32 values of 16-bit weights."""
    shards: ClassVar[bool] = True
    """Whether a rank can do it to its part of a parameter."""

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_number("clip", self.clip, "> 0, or None", lambda x: x > 0)

    @abstractmethod
    def begin(self) -> RuleState:
        """The state of a run that has made no step."""

    def projected(self, terms: Sequence[Term], eps: float) -> list[float]:
        """g_j / n for every term, clipped: the estimate is sum_j g_j / n z_j."""
        slopes = [term.slope / eps for term in terms]
        if self.clip is None:
            return slopes
        bound = self.clip / max(1, len(terms))
        return [max(-bound, min(bound, g)) for g in slopes]


class RuleState(ABC):
    """What a rule remembers, a function of the terms so far: whoever has these, rebuilds it."""

    @abstractmethod
    def change(self, terms: Sequence[Term], settings: Sequence[GroupSettings], rounding: int | None) -> Change:
        """The change of a step, in float64; `rounding` is the seed of its stochastic rounding. The terms are remembered."""

    def clear(self) -> None:  # noqa: B027
        """Forget all: other weights are trained from now on, or a step log begins."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` returned."""
