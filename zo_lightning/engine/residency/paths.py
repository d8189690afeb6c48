"""When to watch a forward pass again: a path through the model that no watched pass took could read other weights."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from zo_lightning.engine.residency.units import Unit, is_compiled

WATCH_AGAIN = 128
"""Evaluations after which a pass is watched again, at the latest; then after twice as many, and so on: a cost that vanishes."""


TRIES = 8
"""How many estimates in a row are watched until the path that an evaluation took comes again; then again when another one takes it."""


class Paths:
    """Which units ran, and which did not, in watched passes; whether evaluations have taken another path since.

    An evaluation in which a unit ran that never did in a watched pass, or rested that never did, has the next ones watched: a branch of
    probability q costs about 1/q more forward passes, at most `TRIES` for each time that it is taken. A read in a branch that runs the same
    units as before is only found by the next periodic pass, if that takes the branch.
    """

    def __init__(self) -> None:
        self.watched = False
        self._ran: set[Unit] = set()
        self._rested: set[Unit] = set()
        self._modes: set[tuple[bool, ...]] = set()
        self._evaluations = 0
        self._again = WATCH_AGAIN
        self._tries = 0

    def watch(self, ran: Set[Unit], rested: Set[Unit], modes: Set[tuple[bool, ...]]) -> None:
        """A pass was watched in which these units ran and those did not; training flags were `modes` around it."""
        self._tries = 0 if self._differs(ran, rested) else self._tries - 1  # it is the other path at last
        self._ran |= ran
        self._rested |= rested
        self._modes |= modes
        self._again = max(self._again, 2 * self._evaluations)
        self.watched = True

    def took(self, ran: Set[Unit], units: Set[Unit]) -> None:
        """An evaluation ended in which of `units` these ran."""
        self._evaluations += 1
        if self._differs(ran, units - ran):
            self._tries = TRIES

    def _differs(self, ran: Set[Unit], rested: Set[Unit]) -> bool:
        return not (ran <= self._ran and rested <= self._rested)

    def unknown(self, modes: tuple[bool, ...]) -> bool:
        """Whether the next evaluation may take a path that was not watched."""
        return not self.watched or self._tries > 0 or self._evaluations >= self._again or modes not in self._modes


class Tree:
    """The modules on the ways from the root to some modules, to notice when one was replaced or compiled; looked at in microseconds."""

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._edges: list[tuple[dict[str, Any], str, nn.Module, bool]] = [({"": root}, "", root, is_compiled(root))]
        self._wanted = set(modules)
        self._visit(root, {})

    def _visit(self, module: nn.Module, leads: dict[nn.Module, bool]) -> bool:
        """Whether `module` is on such a way."""
        if module not in leads:
            leads[module] = module in self._wanted
            for name, child in module._modules.items():
                if child is not None and self._visit(child, leads):
                    self._edges.append((module._modules, name, child, is_compiled(child)))
                    leads[module] = True
        return leads[module]

    def changed(self) -> bool:
        """Whether a module on the way is another one, or was compiled since."""
        return any(parent.get(name) is not child or is_compiled(child) is not was for parent, name, child, was in self._edges)
