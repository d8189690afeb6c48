"""How far to go along an estimate: a step is tried at several lengths and the best is made (Tang et al., ZO-RankSGD, arXiv 2303.03751)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any

from zo_lightning.engine.estimators import Displacement, Term
from zo_lightning.engine.updates import GroupSettings, UpdateRule

_WORST = sys.float_info.max
"""Stands for a value that is not finite: the record of a step that was made has finite values alone."""


def candidates(along: Sequence[float], terms: Sequence[Term], rule: UpdateRule, settings: Sequence[GroupSettings]) -> list[Displacement]:
    """Where the step of these terms leads at each length: theta + length sum_j c_j z_j, as multiples c_j / eps; without weight decay.

    Raises ValueError where groups have other multiples than the first: a displacement has one for all.
    """
    multiples = [tuple(-group.lr * g / group.eps for g in rule.projected(terms, group.eps)) for group in settings]
    for index, own in enumerate(multiples):
        if not all(math.isclose(a, b, rel_tol=1e-9, abs_tol=0.0) for a, b in zip(own, multiples[0], strict=True)):
            ratios = ", ".join(f"{group.lr / group.eps**2:g}" for group in settings)
            raise ValueError(
                f"Steps that are tried before one is made (Conservative, RankSGD's search=) move all parameter groups by one multiple of "
                f"their perturbations, lr / eps**2, and group {index} has another than the first ({ratios}). Give the groups lr and eps of "
                "the same lr / eps**2, or use an estimator that tries none, such as SPSA()."
            )
    return [tuple((term.seed, length * m) for term, m in zip(terms, multiples[0], strict=True)) for length in along]


def as_now(closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure with the variables that it has now, and so have the functions that it got from around it.

    A loop over micro-batches has put the last one into its variables when a search calls the closures of all of them.
    """
    return _as_now(closure, {}) if isinstance(closure, FunctionType) else closure


def _as_now(function: FunctionType, made: dict[int, FunctionType]) -> FunctionType:
    if id(function) in made:
        return made[id(function)]
    cells = tuple(CellType() for _ in function.__closure__ or ())
    same = FunctionType(function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, cells)
    same.__kwdefaults__, same.__dict__ = function.__kwdefaults__, function.__dict__
    made[id(function)] = same
    for own, there in zip(cells, function.__closure__ or (), strict=True):
        try:
            value = there.cell_contents
        except ValueError:  # nothing was assigned to it yet
            continue
        own.cell_contents = _as_now(value, made) if isinstance(value, FunctionType) else value
    return same


def not_tried(count: int, skipped: bool) -> list[float]:
    """The values of candidates that nobody evaluated, for there was no estimate, or no step to be made of it."""
    return [math.nan if skipped else 0.0] * count


def tried(values: Sequence[float]) -> list[float]:
    """The values of candidates as they are recorded."""
    return [value if math.isfinite(value) else _WORST for value in values]


def at_best(along: Sequence[float], terms: Sequence[Term], values: Sequence[float]) -> Sequence[Term]:
    """The terms of the update: at the best of the lengths that were tried, whose values these are."""
    if not along:
        return terms
    length = _best(along, values)
    return [Term(term.seed, length * term.slope) for term in terms]


def _best(along: Sequence[float], values: Sequence[float]) -> float:
    """The length of the least value, the first of equal ones; 0 where no value was finite."""
    least = min(values)
    return 0.0 if least == _WORST else along[list(values).index(least)]
