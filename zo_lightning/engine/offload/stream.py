"""Parcels on their way: read when they are needed, announced to the tier before, and written as soon as they were changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zo_lightning.engine.offload.parcels import Parcel


class Tier(Protocol):
    """Where parcels are while nobody uses them."""

    def announce(self, parcel: Parcel) -> None: ...

    def read(self, parcel: Parcel, memory: Tensor) -> None: ...

    def write(self, parcel: Parcel, memory: Tensor, step: int) -> None: ...


@dataclass
class Traffic:
    """What was moved since the run began: bytes read and written, seconds that it took."""

    read: int = 0
    written: int = 0
    seconds: float = 0.0


@dataclass
class Update:
    """Changes that a parcel lacked: made in memory, to be written, or taken back."""

    step: int
    written: Callable[[], None]
    failed: Callable[[], None]


class Stream:
    """Lends parcels in memory, in buffers that are used again. `update(parcel, memory)` makes the changes that are due; None: there were none.

    All cores copy, one parcel at a time, between steps of the computation: a thread that copied beside it would take a core from kernels
    which wait for the slowest of theirs. What takes long, disks, is left to the system: it reads ahead what was announced, and writes
    behind.
    """

    def __init__(self, tier: Tier, update: Callable[[Parcel, Tensor], Update | None]) -> None:
        self._tier, self._update = tier, update
        self._lent: dict[Parcel, tuple[Tensor, int]] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._follows: dict[tuple[Parcel | None, Parcel], Parcel] = {}
        self._last: tuple[Parcel | None, Parcel | None] = (None, None)
        self.traffic = Traffic()

    def take(self, parcel: Parcel) -> Tensor:
        """The parcel's bytes in memory, with all changes, until as many calls of `give`. OSError where they can't be read or written."""
        if parcel in self._lent:
            memory, count = self._lent[parcel]
            self._lent[parcel] = (memory, count + 1)
            return memory
        memory = self._buffer(parcel)
        self._timed(self._tier.read, parcel, memory)
        self.traffic.read += parcel.nbytes
        update = self._update(parcel, memory)
        if update is not None:
            try:
                self._timed(self._tier.write, parcel, memory, update.step)
            except BaseException:
                self._free.setdefault(len(memory), []).append(memory)
                update.failed()
                raise
            self.traffic.written += parcel.nbytes
            update.written()
        self._lent[parcel] = (memory, 1)
        self._look_ahead(parcel)
        return memory

    def give(self, parcel: Parcel) -> None:
        """One user less."""
        memory, count = self._lent.pop(parcel)
        if count > 1:
            self._lent[parcel] = (memory, count - 1)
        else:
            self._free.setdefault(len(memory), []).append(memory)

    def _buffer(self, parcel: Parcel) -> Tensor:
        free = self._free.get(parcel.nbytes)
        return free.pop() if free else torch.empty(parcel.nbytes, dtype=torch.uint8)

    def _timed(self, move: Callable[..., None], *given: object) -> None:
        began = time.perf_counter()
        try:
            move(*given)
        finally:
            self.traffic.seconds += time.perf_counter() - began

    def _look_ahead(self, parcel: Parcel) -> None:
        """Announce what came next the last time that these two came one after the other."""
        before, last = self._last
        if last is not None:
            self._follows[before, last] = parcel
        self._last = (last, parcel)
        following = self._follows.get((last, parcel))
        if following is not None and following not in self._lent:
            self._tier.announce(following)
