"""How processes share the work of a step: data, the points of a query, or queries of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from zo_lightning.engine.messages import check_count

_HOW = 'a Mesh, or text such as "data=4", "perturbation=2", "data=4,perturbation=2" or "seeds=4"'


UNSET = (
    "{world} processes have data of their own each, as under DDP (data={world}). {option} shares the work otherwise: "
    '"perturbation=2" evaluates the two sides of a query on the same data at the same time, "seeds={world}" gives every process queries of '
    "its own."
)


NOT_SHARDED = (
    'Invalid parallel: "{parallel}" with a sharded model. Its ranks gather weights from each other, so that all of them evaluate all '
    "points: leave parallel out, or use processes that have the whole model each."
)


class Place(NamedTuple):
    """The coordinates of a process."""

    data: int
    seeds: int
    perturbation: int


@dataclass(frozen=True)
class Mesh:
    """data x seeds x perturbation processes; neighbouring ranks have the same data.

    data: processes with other data and the same points; the value of a point is the mean of theirs (DDP, for losses).
    perturbation: processes with the same data that share out the points of a step: theta + eps z here, theta - eps z there.
    seeds: processes with other data and queries of their own: a step has the terms of all of them, `seeds` times as many.

    Raises ValueError for numbers that are not counts.
    """

    data: int = 1
    perturbation: int = 1
    seeds: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(f"{field.name} of the mesh", getattr(self, field.name), "processes")

    @property
    def size(self) -> int:
        """Processes."""
        return math.prod((self.data, self.perturbation, self.seeds))

    @property
    def streams(self) -> int:
        """Processes that see other data."""
        return self.data * self.seeds

    def place(self, rank: int) -> Place:
        """Where a process stands."""
        rest, perturbation = divmod(rank, self.perturbation)
        return Place(*divmod(rest, self.seeds), perturbation)

    def stream(self, rank: int) -> int:
        """Which of the streams of data a process sees."""
        return rank // self.perturbation

    def mine(self, rank: int, points: int) -> range:
        """Which of the points of a step a process evaluates; they are in order, and those of one query are together."""
        place = self.place(rank)
        own = points // self.seeds
        begin = place.seeds * own
        first, last = (begin + own * part // self.perturbation for part in (place.perturbation, place.perturbation + 1))
        return range(first, last)

    def __str__(self) -> str:
        return ",".join(f"{field.name}={value}" for field in fields(self) if (value := getattr(self, field.name)) > 1) or "data=1"


def as_mesh(given: str | Mesh | None, world_size: int) -> Mesh:
    """The mesh for an option; None is data parallel. ValueError for one that does not have as many processes as there are."""
    mesh = Mesh(data=world_size) if given is None else mesh_of(given)
    if mesh.size != world_size:
        raise ValueError(
            f'Invalid parallel: "{mesh}" is a mesh of {mesh.size} processes, and there are {world_size}. The product of data, '
            "perturbation and seeds must be the number of processes."
        )
    return mesh


def mesh_of(given: str | Mesh) -> Mesh:
    """ValueError for text that names none."""
    return given if isinstance(given, Mesh) else _parsed(given)


def _parsed(text: object) -> Mesh:
    names = [field.name for field in fields(Mesh)]
    parts: dict[str, int] = {}
    for part in text.split(",") if isinstance(text, str) else [""]:
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in names or name in parts or not number.isdecimal():
            raise ValueError(f"Invalid parallel: {text!r}. Must be {_HOW}.")
        parts[name] = int(number)
    return Mesh(**parts)
