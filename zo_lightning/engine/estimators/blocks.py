"""Points that lie in blocks: one for each process that has seeds and data of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from zo_lightning.engine.estimators.base import Estimator, T, split
from zo_lightning.engine.messages import check_count

Own = TypeVar("Own", bound="InBlocks")


@dataclass(frozen=True)
class InBlocks(Estimator):
    """An estimator of n queries whose points include the weights themselves, once in a block.

    `processes` is of how many processes with data of their own (parallel="seeds=...") the points are; the exchange sets it.
    """

    queries: int = 1
    processes: int = field(default=1, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the perturbations a step")
        check_count("processes", self.processes, "the processes with data of their own")

    @property
    @abstractmethod
    def width(self) -> int:
        """Points of a block."""

    @property
    def count(self) -> int:
        """Directions of a step."""
        return self.queries * self.processes

    def blocks(self, each: Sequence[T]) -> list[Sequence[T]]:
        """Points or values by process."""
        return split(each, self.width)

    def of(self, process: int) -> range:
        """Which queries a process has."""
        return range(process * self.queries, (process + 1) * self.queries)

    def times(self: Own, processes: int) -> Own:
        return replace(self, processes=processes)
