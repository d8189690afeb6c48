"""The engine's options, with the same names and defaults under every host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from zo_lightning.engine.estimators import ESTIMATORS, SPSA, Estimator
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import check_number, choose
from zo_lightning.engine.noise import NOISES, Noise
from zo_lightning.engine.objectives import Objective
from zo_lightning.engine.parallel import Mesh, mesh_of
from zo_lightning.engine.residency import WEIGHTS, Offload
from zo_lightning.engine.safeguard import Safeguard

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer


@dataclass(frozen=True)
class EngineOptions:
    """What `ZOOptimizer`, `ZOStrategy` and `ZOConfig` take; `lr` and `weight_decay` None mean the host's own.

    `eps` None, and `lr` where no host has one: what suits the kind of parameters that are trained (kinds.py).
    """

    lr: float | None = None
    eps: float | None = None
    seed: int = 0
    noise: str | Noise = "rademacher"
    estimator: str | Estimator | None = None
    weights: str | Offload = "auto"
    weight_decay: float | None = None
    dropout: bool = True
    clip: float | None = None
    safeguard: str | Safeguard | None = "stop"
    max_nonfinite: int = 20
    mask: Mask | None = None
    objective: Objective | None = None
    parallel: str | Mesh | None = None
    """How a host's processes share the work; the host gives the optimizer its exchange."""

    def validate(self) -> None:
        """Raise ValueError that names the option, its value and what is allowed."""
        if self.eps is not None:
            check_number("eps", self.eps, "> 0, or None", lambda x: x > 0)
        if self.lr is not None:
            check_number("lr", self.lr, ">= 0", lambda x: x >= 0)
        if self.weight_decay is not None:
            check_number("weight_decay", self.weight_decay, ">= 0", lambda x: x >= 0)
        if self.clip is not None:
            check_number("clip", self.clip, "> 0, or None", lambda x: x > 0)
        for name, least in (("seed", 0), ("max_nonfinite", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 64:
                raise ValueError(f"Invalid {name}: {value!r}. Must be an integer >= {least} and < 2**64.")
        if not isinstance(self.dropout, bool):
            raise ValueError(f"Invalid dropout: {self.dropout!r}. Must be True (as the model is set) or False (Dropout modules off).")
        if not isinstance(self.weights, Offload):
            choose("weights", self.weights, WEIGHTS, "an Offload")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"Invalid mask: {self.mask!r}. Must be a Mask (zo_lightning.engine.masks), or None.")
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ValueError(f"Invalid objective: {self.objective!r}. Must be an Objective (zo_lightning.engine.objectives), or None.")
        if self.parallel is not None:
            mesh_of(self.parallel)
        as_noise(self.noise)
        estimator = as_estimator(self.estimator)
        if self.clip is not None and not estimator.clips:
            raise ValueError(
                f"Invalid clip: {self.clip!r} with estimator={self.estimator!r}, whose terms have a fixed size and sum to zero, which a "
                "bound on each would spoil. Leave clip out; a smaller lr makes smaller steps."
            )
        as_safeguard(self.safeguard)

    def build(
        self, params: Any, *, module: nn.Module | None = None, lr: float | None = None, weight_decay: float | None = None
    ) -> ZOOptimizer:
        """The optimizer; `lr` and `weight_decay` are the host's, used where the option is None."""
        from zo_lightning.engine.optimizer import ZOOptimizer

        lr = self.lr if self.lr is not None else lr
        decay = self.weight_decay if self.weight_decay is not None else weight_decay
        return ZOOptimizer(
            params,
            lr,
            weight_decay=0.0 if decay is None else decay,
            module=module,
            **self.keywords(),
        )

    def keywords(self) -> dict[str, Any]:
        """What `ZOOptimizer` takes beside params, lr, weight_decay and module."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("lr", "weight_decay", "parallel")}


_GROUP_CHECKS = (
    ("lr", ">= 0", lambda x: x >= 0),
    ("eps", "> 0", lambda x: x > 0),
    ("weight_decay", ">= 0", lambda x: x >= 0),
)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a learning rate, scale or weight decay of a parameter group that is out of range."""
    for name, allowed, good in _GROUP_CHECKS:
        check_number(name, group[name], allowed, good)
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if lr * decay > 1:
        raise ValueError(f"Invalid weight_decay: {decay!r} with lr={lr!r}. Weights shrink by lr * weight_decay, which must be <= 1.")


def as_noise(noise: str | Noise) -> Noise:
    """The noise object for a name or an object."""
    return noise if isinstance(noise, Noise) else choose("noise", noise, NOISES, "a Noise")()  # type: ignore[operator]


def as_estimator(estimator: str | Estimator | None) -> Estimator:
    """The estimator for a name, an object, or None (SPSA with one query)."""
    if estimator is None:
        return SPSA()
    return estimator if isinstance(estimator, Estimator) else choose("estimator", estimator, ESTIMATORS, "an Estimator")()  # type: ignore[operator]


def as_safeguard(safeguard: str | Safeguard | None) -> Safeguard | None:
    """A safeguard of its own for each optimizer, so that runs do not share their history."""
    if safeguard is None:
        return None
    if isinstance(safeguard, Safeguard):
        return Safeguard(safeguard.window, safeguard.tolerance, safeguard.action)
    if not isinstance(safeguard, str):
        raise ValueError(f"Invalid safeguard: {safeguard!r}. Use 'stop', 'halve', 'warn', None, or a Safeguard(...).")
    return Safeguard(action=safeguard)
