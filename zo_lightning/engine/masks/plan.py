"""What a mask is made of: a rule, how many weights, of which layers, and how often it is made anew."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any

from zo_lightning.engine.masks.parts import Blockwise, HalfLayers, LayerSampling, Structured, Where
from zo_lightning.engine.masks.rules import Chosen, Draw, LargeWeights, Layer, MaskRule, NofM, Random, SmallWeights
from zo_lightning.engine.masks.scored import PrincipalWeights, Sensitive
from zo_lightning.engine.masks.select import counts_of_all
from zo_lightning.engine.messages import check_count, check_number, choose

_BY_WEIGHT = (SmallWeights, LargeWeights, Random, NofM, Sensitive, PrincipalWeights)
RULES: dict[str, object] = {kind.name: kind for kind in (*_BY_WEIGHT, HalfLayers, LayerSampling, Blockwise, Structured, Where)}
WHOLE, FROZEN = -1, -2
"""Counts of layers that the rule is not asked about: trained as without a mask, not trained."""

Density = float | Mapping[str, float] | Callable[[int], float]


@dataclass(frozen=True, init=False)
class Mask:
    """Which weights are trained: z' = m z in perturbation and update, m from a rule; weight decay shrinks trained weights alone.

    Args:
        rule: a `MaskRule`, or its name.
        density: share of the weights of each layer that is trained, in (0, 1]; a number, a mapping from patterns of layer names to
            numbers (the first that fits counts), or a function of the step, looked up at each refresh. None for rules with their own.
        budget: "layer" gives each layer its density; "global" gives their total to the weights that are the smallest or largest of all.
        refresh: steps between two masks; None keeps the first one. until: from this step on, the mask stays as it is.
        include: patterns of the layers that the rule is for; the others are trained in full. exclude: of those, layers that are not.
        frozen: patterns of layers that are not trained at all.

    A layer is a trained tensor, biases and norms like any other. Patterns are those of `fnmatch` on names without the longest common
    prefix. Raises ValueError for an option out of range here, and before the first step for patterns that fit no layer and for masks
    that leave nothing to train.
    """

    rule: MaskRule
    density: Density | None
    budget: str
    refresh: int | None
    until: int | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    frozen: tuple[str, ...]

    def __init__(
        self,
        rule: str | MaskRule,
        density: Density | None = None,
        budget: str = "layer",
        refresh: int | None = None,
        until: int | None = None,
        include: str | Sequence[str] = ("*",),
        exclude: str | Sequence[str] = (),
        frozen: str | Sequence[str] = (),
    ) -> None:
        own = {"rule": as_rule(rule), "density": density, "budget": budget, "refresh": refresh, "until": until}
        patterns = {"include": include, "exclude": exclude, "frozen": frozen}
        for option, value in {**own, **{name: _patterns(name, given) for name, given in patterns.items()}}.items():
            object.__setattr__(self, option, value)
        self._check()

    def _check(self) -> None:
        self._check_density()
        for option in ("refresh", "until"):
            value = getattr(self, option)
            if value is not None:
                check_count(option, value, "steps; None does without")
        if self.until is not None and self.refresh is None:
            raise ValueError(f"until={self.until} does nothing without refresh=.")
        self._check_measuring()

    def _check_measuring(self) -> None:
        steps = self.rule.measures
        if steps and self.refresh is not None and self.refresh <= steps:
            raise ValueError(f"Invalid refresh: {self.refresh}. Must be more than the {steps} steps for which {self.rule!r} measures.")
        if steps and self.until is not None and self.measuring(self.number(self.until)):
            raise ValueError(f"Invalid until: {self.until}. {self.rule!r} still measures then; the mask would never be made.")

    def _check_density(self) -> None:
        density, rule = self.density, self.rule
        if not rule.has_density:
            if density is not None:
                raise ValueError(f"density={density!r} does nothing with {rule!r}, which has a share of its own. Leave it out.")
        elif density is None:
            raise ValueError(f"The rule {rule.name!r} needs density=, the share of the weights that is trained, in (0, 1].")
        elif isinstance(density, Mapping):
            if not density:
                raise ValueError("Invalid density: an empty mapping. Give {pattern: number}, with '*' for the other layers.")
            for pattern, share in density.items():
                check_density(share, f"density of {pattern!r}")
        elif callable(density):
            if self.refresh is None:
                raise ValueError("density is a function of the step, which is looked up at each refresh: give refresh=, too.")
        else:
            check_density(density, "density")
        choose("budget", self.budget, {"layer": None, "global": None})
        if self.budget == "global" and not isinstance(rule, (SmallWeights, LargeWeights)):
            raise ValueError(f"budget='global' compares weights of all layers, for which {rule.name!r} has no measure. Use budget='layer'.")

    def described(self) -> str:
        """The options in words; functions are only said to be some, for they look different in each process."""
        known: tuple[Field[Any], ...] = fields(self.rule) if is_dataclass(self.rule) else ()
        rule = [f"{field.name}={_words(getattr(self.rule, field.name))}" for field in known]
        rest = [f"{field.name}={_words(getattr(self, field.name))}" for field in fields(self)[1:]]
        return f"{type(self.rule).__name__}({', '.join(rule)}), {', '.join(rest)}"

    def number(self, step: int) -> int:
        """Which mask, counted from 0, a step has. Where the rule measures, even masks are those of the steps that do."""
        last = step if self.until is None else min(step, max(self.until - 1, 0))
        period, within = (0, last) if self.refresh is None else divmod(last, self.refresh)
        return period if not self.rule.measures else 2 * period + (within >= self.rule.measures)

    def measuring(self, number: int) -> bool:
        """Whether the steps with that mask measure: they perturb every layer the rule is for, and move nothing."""
        return self.rule.measures > 0 and number % 2 == 0

    def counts(self, layers: Sequence[Layer], step: int) -> dict[int, int]:
        """How many elements of each layer, by key, are to be trained; WHOLE or FROZEN where the rule is not asked. ValueError as above."""
        self._check_patterns([layer.name for layer in layers])
        counts = {}
        for layer in layers:
            if _fits(layer.name, self.frozen):
                counts[layer.key] = FROZEN
            elif not _fits(layer.name, self.include) or _fits(layer.name, self.exclude):
                counts[layer.key] = WHOLE
            else:
                counts[layer.key] = round(self._density_of(layer.name, step) * layer.tensor.numel())
        if all(count < 0 for count in counts.values()):
            options = f"include={self.include!r}, exclude={self.exclude!r} and frozen={self.frozen!r}"
            raise ValueError(f"{options} leave no layer to {self.rule!r}. Leave it some, or do without a mask.")
        if self.budget == "global":
            asked = [layer for layer in layers if counts[layer.key] >= 0]
            total, largest = sum(counts[layer.key] for layer in asked), isinstance(self.rule, LargeWeights)
            shares = counts_of_all([layer.tensor for layer in asked], total, largest)
            counts.update((layer.key, share) for layer, share in zip(asked, shares, strict=True))
        return counts

    def _check_patterns(self, names: Sequence[str]) -> None:
        densities = self.density if isinstance(self.density, Mapping) else {}
        for option, patterns in (("include", self.include), ("exclude", self.exclude), ("frozen", self.frozen), ("density", densities)):
            for pattern in patterns:
                fitting = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
                if not fitting:
                    raise ValueError(f"{option}: the pattern {pattern!r} fits no trained layer. {_near(pattern, names)}")
                if option == "density" and all(_first(name, densities) != pattern for name in fitting):
                    sooner = _first(fitting[0], densities)
                    raise ValueError(
                        f"density: {sooner!r} stands before {pattern!r} and fits its layers, such as {fitting[0]!r}; the first one "
                        f"counts. Put {pattern!r} first."
                    )

    def _density_of(self, name: str, step: int) -> float:
        density = self.density
        if density is None:
            return 1.0
        if isinstance(density, Mapping):
            pattern = _first(name, density)
            if pattern is None:
                raise ValueError(
                    f"density: no pattern fits the layer {name!r}. Add '*' for the other layers, or name it in exclude= or frozen=."
                )
            return float(density[pattern])
        return check_density(density(step), f"density at step {step}") if callable(density) else float(density)

    def make(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        """The masks by parameter key. ValueError where nothing is left to train."""
        asked = [layer for layer in layers if counts[layer.key] >= 0]
        chosen: Chosen = {layer.key: None for layer in layers if counts[layer.key] == WHOLE}
        if self.measuring(draw.number):
            chosen.update({layer.key: None for layer in asked if counts[layer.key]})
        elif asked:
            chosen.update(self.rule.choose(asked, {layer.key: counts[layer.key] for layer in asked}, draw))
        if not any(layer.key in chosen and layer.tensor.numel() for layer in layers):
            why = "Use a higher density" if any(0 <= count < 1 for count in counts.values()) else "Look at frozen= and at the rule"
            raise ValueError(f"The mask {self.rule!r} with density={self.density!r} leaves nothing to train. {why}.")
        return chosen


def _words(value: object) -> str:
    return "a function" if callable(value) else repr(value)


def check_density(value: object, name: str) -> float:
    """`value` as a float in (0, 1]; ValueError otherwise."""
    check_number(name, value, "> 0 and <= 1, the share of the weights that is trained", lambda x: 0 < x <= 1)
    return float(value)  # type: ignore[arg-type]


def as_rule(rule: str | MaskRule) -> MaskRule:
    """The rule object for a name or an object."""
    if isinstance(rule, str):
        named = {name: kind for name, kind in RULES.items() if kind is not Where}
        found: MaskRule = choose("rule", rule, named, "a MaskRule")()  # type: ignore[operator]
        return found
    if not isinstance(rule, MaskRule):
        names = ", ".join(repr(name) for name, kind in RULES.items() if kind is not Where)
        hint = f" Did you mean {rule.__name__}()?" if isinstance(rule, type) else ""
        raise ValueError(f"Invalid rule: {rule!r}. Must be a MaskRule or one of {names}.{hint}")
    return rule


def _patterns(option: str, value: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"Invalid {option}: {value!r}. Must be a pattern of layer names, or several.")
    return patterns


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _first(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _near(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern.strip("*"), names, n=4, cutoff=0.3) or list(names[:4])
    return f"There are {len(names)} layers, such as {', '.join(map(repr, near))}."
