"""What belongs to one evaluation while it runs: several may take turns, each with its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.units import Unit


class OpenModules:
    """The modules that run, and what is to be closed when they end."""

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Module, ExitStack]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def entered(self, module: nn.Module, stack: ExitStack) -> None:
        """A module begins to run."""
        self._entries.append((module, stack))

    def left(self, module: nn.Module) -> None:
        """It ended, and so did all that began after it (what an interrupt left open)."""
        if any(one is module for one, _ in self._entries):
            while True:
                one, stack = self._entries.pop()
                stack.close()
                if one is module:
                    break

    def close(self, ended: Callable[[nn.Module], bool] = lambda module: True) -> None:
        """After an exception: what is still open, innermost first, until one that has not `ended`."""
        while self._entries and ended(self._entries[-1][0]):
            self._entries.pop()[1].close()


@dataclass
class Lane:
    """The state of an evaluation on scratch memory."""

    point: tuple[Displacement | None, Sequence[float]] | None = None
    """A displacement of None is a pass that is watched, on the base weights."""
    away: dict[int, tuple[Trained, list[Tensor], Tensor]] = field(default_factory=dict)
    """By id of a weight that points to scratch: the weight, the places of its base, where it points to."""
    ready: dict[int, Tensor] = field(default_factory=dict)
    """Perturbed weights that were written before any module asked for them."""
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
