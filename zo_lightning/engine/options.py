"""The engine's options, with the same names and defaults under every host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from zo_lightning.engine.backprop import Backprop, as_backprop
from zo_lightning.engine.estimators import ESTIMATORS, SPSA, Estimator, Ways
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.messages import check_number, choose
from zo_lightning.engine.noise import Basis, Noise, Rademacher, as_noise
from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.objectives import Objective
from zo_lightning.engine.parallel import Mesh, mesh_of
from zo_lightning.engine.residency import WEIGHTS, Offload, Residency
from zo_lightning.engine.safeguard import Safeguard
from zo_lightning.engine.tangents import check_tables, places_of
from zo_lightning.engine.updates import RULES, SGD, GroupSettings, TorchOptimizer, UpdateRule

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
        if not isinstance(self.weights, Offload):
            choose("weights", self.weights, WEIGHTS, "an Offload")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise ValueError(f"Invalid mask: {self.mask!r}. Must be a Mask (zo_lightning.engine.masks), or None.")
        if self.objective is not None and not isinstance(self.objective, Objective):
            raise ValueError(f"Invalid objective: {self.objective!r}. Must be an Objective (zo_lightning.engine.objectives), or None.")
        if self.parallel is not None:
            mesh_of(self.parallel)
        noise, rule = as_noise(self.noise), as_rule(self.update, self.clip)
        estimator = rule.measured_by(as_estimator(self.estimator))
        if estimator.noise is not None and self.noise != "rademacher" and not isinstance(self.noise, Basis):
            raise ValueError(
                f"Invalid noise: {self.noise!r} does nothing with estimator={estimator!r}, whose points are not random. Leave noise out."
            )
        if estimator.noise is None and isinstance(self.noise, Basis):
            raise ValueError(
                f"Invalid noise: {self.noise!r} with estimator={estimator!r}. It is for Coordinatewise(), which brings it along."
            )
        if estimator.coordinates is not None:
            self._validate_coordinates(estimator, estimator.coordinates)
        if estimator.tangents and self.objective is not None:
            raise ValueError(
                f"Invalid estimator: {estimator!r} with objective={self.objective!r}: it differentiates the loss, and others have no "
                "derivative. Use SPSA(), which needs none."
            )
        if estimator.tangents and isinstance(self.weights, Offload):
            raise ValueError(
                f"Invalid estimator: {estimator!r} with weights=Offload(...): tangents of all trained weights are in memory at "
                "once. Use SPSA()."
            )
        estimator.begin().check([GroupSettings(self.lr or 0.0, self.eps or 1.0, self.weight_decay or 0.0)])
        if estimator.remembers and rule.dense:
            raise ValueError(
                f"Invalid update: {self.update!r} with estimator={self.estimator!r}, which finds its anchor behind the steps since: they "
                'have to be sums of perturbations. Use update="sgd" or "momentum", or an estimator without an anchor.'
            )
        self._check_backprop(estimator)
        if estimator.along and not isinstance(rule, SGD):
            raise ValueError(
                f"Invalid update: {self.update!r} with estimator={self.estimator!r}, which tries steps along the estimate before it makes "
                'one. Use update="sgd", or an estimator without a search.'
            )
        if rule.dense and isinstance(self.weights, Offload):
            raise ValueError(
                f"Invalid update: {self.update!r} with weights=Offload(...), whose updates are made while weights are on their way, and it "
                'needs the estimate as a tensor. Use update="sgd" or "momentum", or keep the weights in memory.'
            )
        if rule.clip is not None and not estimator.clips:
            raise ValueError(
                f"Invalid clip: {rule.clip!r} with estimator={self.estimator!r}, whose terms mean something only together: "
                "a bound on each would spoil that. Leave clip out; a smaller lr makes smaller steps."
            )
        if rule.rescales and isinstance(noise, Rademacher):
            raise ValueError(
                f"Invalid noise: {noise.text!r} with update={self.update!r}, which tells weights apart by z^2, and here all are 1. Use "
                'noise="gaussian".'
            )
        if rule.rescales and self.mask is not None and self.mask.rule.measures:
            raise ValueError(
                f"Invalid mask: {self.mask!r} with update={self.update!r}: the mean of what its steps measure has noise of one size. Use a "
                "mask whose rule measures nothing."
            )
        as_safeguard(self.safeguard)

    def _check_backprop(self, estimator: Estimator) -> None:
        if as_backprop(self.backprop) is None:
            return
        problem = None
        if estimator.tangents:
            problem = f"estimator={estimator!r}, whose evaluations are in forward mode: use SPSA() or OneSided()"
        elif estimator.coordinates is not None:
            problem = f"estimator={estimator!r}, which evaluates every weight by itself: use SPSA() or OneSided()"
        elif estimator.remembers:
            problem = f"estimator={estimator!r}, half of whose points lie at an anchor, which the last layers have none of: use SPSA()"
        elif isinstance(self.weights, Offload):
            problem = "weights=Offload(...): a graph would keep weights that are on their way; keep them in memory"
        elif self.objective is not None and not self.objective.needs_output:
            problem = f"objective={self.objective!r}, which evaluates no loss whose gradient could be taken; use one that reads the output"
        if problem:
            raise ValueError(f"Invalid backprop: {self.backprop!r} with {problem}, or leave backprop out.")

    def _validate_coordinates(self, estimator: Estimator, ways: Ways) -> None:
        if isinstance(self.weights, Offload):
            raise ValueError(
                f"Invalid weights: {self.weights!r} with estimator={estimator!r}, which writes single weights in memory. Use "
                'weights="auto", or SPSA() with streamed weights.'
            )
        if ways.batch > 1 and self.objective is not None:
            raise ValueError(
                f"Invalid batch: {ways.batch} with objective={self.objective!r}, which is observed at one point after another. Use batch=1."
            )

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
