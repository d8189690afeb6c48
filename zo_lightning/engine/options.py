"""The engine's options, with the same names and defaults under every host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from zo_lightning.engine.backprop import Backprop, as_backprop
from zo_lightning.engine.combinations import check_together
from zo_lightning.engine.estimators import ESTIMATORS, SPSA, Estimator
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import check_number, choose
from zo_lightning.engine.noise import Noise, as_noise
from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.objectives import Objective
from zo_lightning.engine.parallel import Mesh, mesh_of
from zo_lightning.engine.residency import WEIGHTS, Batched, Offload, Residency
from zo_lightning.engine.safeguard import Safeguard
from zo_lightning.engine.shown import places_of
from zo_lightning.engine.tangents import check_tables
from zo_lightning.engine.updates import RULES, TorchOptimizer, UpdateRule

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
    update: str | UpdateRule = "sgd"
    weights: str | Offload | Batched = "auto"
    weight_decay: float | None = None
    dropout: bool = True
    clip: float | None = None
    safeguard: str | Safeguard | None = "stop"
    max_nonfinite: int = 20
    mask: Mask | None = None
    objective: Objective | None = None
    parallel: str | Mesh | None = None
    """How a host's processes share the work; the host gives the optimizer its exchange."""
    backprop: str | Sequence[str] | Backprop | None = None

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
        if not isinstance(self.weights, (Offload, Batched)):
            choose("weights", self.weights, WEIGHTS, "an Offload or Batched")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"Invalid mask: {self.mask!r}. Must be a Mask (zo_lightning.engine.masks), or None.")
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ValueError(f"Invalid objective: {self.objective!r}. Must be an Objective (zo_lightning.engine.objectives), or None.")
        if self.parallel is not None:
            mesh_of(self.parallel)
        rule = as_rule(self.update, self.clip)
        check_together(self, rule, rule.measured_by(as_estimator(self.estimator)), as_noise(self.noise), as_backprop(self.backprop))
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


def as_estimator(estimator: str | Estimator | None) -> Estimator:
    """The estimator for a name, an object, or None (SPSA with one query)."""
    if estimator is None:
        return SPSA()
    return estimator if isinstance(estimator, Estimator) else choose("estimator", estimator, ESTIMATORS, "an Estimator")()  # type: ignore[operator]


def as_rule(update: str | UpdateRule, clip: float | None = None) -> UpdateRule:
    """The update rule for a name or an object, with the option `clip`. ValueError where both have a bound, and they differ."""
    named = {name: rule for name, rule in RULES.items() if rule is not TorchOptimizer}
    objects = "an UpdateRule such as TorchOptimizer('RMSprop', alpha=0.9)"
    rule = update if isinstance(update, UpdateRule) else choose("update", update, named, objects)()  # type: ignore[operator]
    if clip is None:
        return rule
    if rule.clip not in (None, clip):
        raise ValueError(f"Invalid clip: {clip!r} beside update={update!r}, which has another one. Give one of them.")
    return replace(rule, clip=clip)


def check_rule(rule: UpdateRule, residency: Residency) -> None:
    """ValueError where an update rule can't be used with these weights."""
    rule.check(residency.trained)
    if not rule.dense:
        return
    if residency.name == "inplace" and any(rounds(p.tensor.dtype) for p in residency.trained):
        raise ValueError(
            f'Invalid update: {rule.name!r} with weights="inplace" and 16-bit weights, of which this rule keeps float32 values: moves '
            'in place would leave them behind. Use weights="exact" or "copy".'
        )
    if any(p.region is not None for p in residency.trained) and (rule.remembers or not rule.shards):
        raise ValueError(
            f'Invalid update: {rule!r} with sharded weights, for which its state is not kept. Use update="sgd", "sign" or "momentum".'
        )


def check_estimator(estimator: Estimator, residency: Residency) -> None:
    """ValueError where an estimator can't be used with these weights."""
    if estimator.coordinates is not None and any(p.region is not None for p in residency.trained):
        raise ValueError(f"Invalid estimator: {estimator!r} with sharded weights, of which no process has all. Use SPSA().")
    if estimator.coordinates is not None and residency.module is not None:
        check_tables(places_of(residency.module, residency.trained), "displaced elements are put back by themselves")
    if estimator.tangents:
        if any(p.region is not None for p in residency.trained):
            raise ValueError(f"Invalid estimator: {estimator!r} with sharded weights, which have no tangents here. Use SPSA().")
        check_tables(places_of(residency.module, residency.trained))


def as_safeguard(safeguard: str | Safeguard | None) -> Safeguard | None:
    """A safeguard of its own for each optimizer, so that runs do not share their history."""
    if safeguard is None:
        return None
    if isinstance(safeguard, Safeguard):
        return Safeguard(safeguard.window, safeguard.tolerance, safeguard.action)
    if not isinstance(safeguard, str):
        raise ValueError(f"Invalid safeguard: {safeguard!r}. Use 'stop', 'halve', 'warn', None, or a Safeguard(...).")
    return Safeguard(action=safeguard)
