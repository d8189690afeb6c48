"""The ways between a tier and buffers of the device: straight from CPU memory, or by threads from files, staged where they must be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.lanes import Lanes, Mark
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.stamps import Moment, checksum
from zo_lightning.engine.offload.tiers import MemoryTier, Pinned
from zo_lightning.engine.offload.transfers import rounded

Copying = Future[Mark]
"""A copy that will be asked for; its result is the mark of the copy's end."""


class Route(ABC):
    """Copies are asked for in the order of the calls, in each direction."""

    @abstractmethod
    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        """The parcel, as it is at home after `after`, to memory of the device of at least its size."""

    @abstractmethod
    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        """What the device has is the parcel at `moment`; the copy has ended when it is at home."""


class Straight(Route):
    """From and to CPU memory, which is pinned where the device computes beside it: one copy each, and nobody waits."""

    def __init__(self, tier: MemoryTier, lanes: Lanes) -> None:
        self._tier, self._lanes = tier, lanes

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return _done(self._lanes.inward(memory[: parcel.nbytes], self._tier.flat(parcel), _marks(after)))

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        return _done(self._lanes.outward(self._tier.flat(parcel), memory[: parcel.nbytes], _marks(after)))


class Staged(Route):
    """From and to files, to a device that can't be read into: a thread for each direction copies through memory that is pinned."""

    def __init__(self, tier: DiskTier, lanes: Lanes, largest: int) -> None:
        self._tier, self._lanes = tier, lanes
        self._reader, self._writer = (ThreadPoolExecutor(1, f"zo-{name}") for name in ("read", "write"))
        self._memory = Pinned(lanes)
        self._in, self._out = (self._memory.allocate(rounded(largest), 2 * largest) for _ in range(2))

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return self._reader.submit(self._load, parcel, memory, after)

    def _load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Mark:
        with self._lanes.here(), torch.no_grad():
            marks = _marks(after)  # of the parcel's own way home, too: it is read once that has ended
            self._tier.read_pages(parcel, self._in)
            mark = self._lanes.inward(memory[: parcel.nbytes], self._in[: parcel.nbytes], marks)
            self._lanes.join(mark)  # the staging buffer is free again
            return mark

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        return self._writer.submit(self._save, parcel, memory, after, moment)

    def _save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Mark:
        with self._lanes.here(), torch.no_grad():
            mark = self._lanes.outward(self._out[: parcel.nbytes], memory[: parcel.nbytes], after)
            self._lanes.join(mark)
            self._tier.write_pages(parcel, self._out, moment, checksum(self._out[: rounded(parcel.nbytes)]))
            return mark


class Files(Route):
    """From and to files where the CPU computes: a thread for each direction, which only waits for the disk."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self._reader, self._writer = (ThreadPoolExecutor(1, f"zo-{name}") for name in ("read", "write"))

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return self._reader.submit(self._load, parcel, memory, after)

    def _load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Mark:
        _marks(after)
        with torch.no_grad():
            self._tier.read_pages(parcel, memory)

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        sums = checksum(memory[: rounded(parcel.nbytes)])  # here, by all cores
        return self._writer.submit(self._tier.write_pages, parcel, memory, moment, sums)


def _done(mark: Mark) -> Copying:
    future: Future[Any] = Future()
    future.set_result(mark)
    return future


def _marks(after: Sequence[Mark | Copying]) -> list[Mark]:
    """Marks, once the copies among `after` were asked for. One that failed leaves what there was, and is told to whoever saved."""
    found = []
    for one in after:
        if not isinstance(one, Future):
            found.append(one)
        elif one.exception() is None:
            found.append(one.result())
    return found
