"""What belongs to one evaluation while it runs: several may take turns, each with its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.running import OpenModules
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.units import Unit


class Ahead(NamedTuple):
    """Perturbed weights of the next point, which were written with those of the one before, and what gives their memory back."""

    point: Displacement
    outs: list[Tensor]
    give_back: Callable[[], None]


@dataclass
class Lane:
    """The state of an evaluation on scratch memory."""

    point: tuple[Displacement | None, Sequence[float]] | None = None
    """A displacement of None is a pass that is watched, on the base weights."""
    away: dict[int, tuple[Trained, list[Tensor], Tensor]] = field(default_factory=dict)
    """By id of a weight that points to scratch: the weight, the places of its base, where it points to."""
    ready: dict[int, Tensor] = field(default_factory=dict)
    """Perturbed weights that were written before any module asked for them."""
    expected: Sequence[Displacement] = ()
    """The points of the session, in their order."""
    ahead: Ahead | None = None
    swap: Swap | None = None
    displaced: bool = False
    """Whether the listed elements of `swap` are to be displaced when it goes on."""
    materialized: int = 0
    """How many units were on scratch."""
    open: OpenModules = field(default_factory=OpenModules)
    entries: Counter[Unit] = field(default_factory=Counter)
    kept: dict[Unit, dict[int, Tensor]] = field(default_factory=dict)
    whole: ExitStack = field(default_factory=ExitStack)
    """What is to be closed when the evaluation ends."""
