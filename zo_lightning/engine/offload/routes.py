"""The two ways between a tier and buffers of the device: straight from pinned memory, or from files by threads through a staging buffer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.offload.direct import rounded
from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.lanes import Lanes, Mark
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.stamps import Moment, checksum
from zo_lightning.engine.offload.tiers import MemoryTier, Pinned, Tier

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


class Direct(Route):
    """From and to CPU memory, which is pinned where the device computes beside it: one copy each, and nobody waits."""

    def __init__(self, tier: MemoryTier, lanes: Lanes) -> None:
        self._tier, self._lanes = tier, lanes

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return _done(self._lanes.inward(memory[: parcel.nbytes], self._tier.flat(parcel), _marks(after)))

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        return _done(self._lanes.outward(self._tier.flat(parcel), memory[: parcel.nbytes], _marks(after)))


class Staged(Route):
    """From and to a tier whose tensors can't be pinned: a thread for each direction copies through memory that is."""

    def __init__(self, tier: Tier, lanes: Lanes, largest: int) -> None:
        self._tier, self._lanes = tier, lanes
        self._reader, self._writer = (ThreadPoolExecutor(1, f"zo-{name}") for name in ("read", "write"))
        self._memory = Pinned(lanes)
        self._in, self._out = (self._memory.allocate(largest, 2 * largest) for _ in range(2))

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return self._reader.submit(self._load, parcel, memory, after)

    def _load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Mark:
        with self._lanes.here(), torch.no_grad():
            marks = _marks(after)  # of the parcel's own way home, too: it is read once that has ended
            self._tier.fetch(parcel)
            for home, view in zip(self._tier.home(parcel), _views(parcel, self._in), strict=True):
                view.copy_(home)
            self._tier.forget(parcel)
            mark = self._lanes.inward(memory[: parcel.nbytes], self._in[: parcel.nbytes], marks)
            self._lanes.join(mark)  # the staging buffer is free again
            return mark

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        return self._writer.submit(self._save, parcel, memory, after, moment)

    def _save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Mark:
        with self._lanes.here(), torch.no_grad():
            staged = self._out[: parcel.nbytes]
            mark = self._lanes.outward(staged, memory[: parcel.nbytes], after)
            self._lanes.join(mark)
            self._tier.write(parcel, _views(parcel, staged), moment)
            return mark


class PastCache(Route):
    """From and to files on a CPU machine: a thread for each direction, which only waits for the disk."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self._reader, self._writer = (ThreadPoolExecutor(1, f"zo-{name}") for name in ("read", "write"))

    def load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Copying:
        return self._reader.submit(self._load, parcel, memory, after)

    def _load(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark | Copying]) -> Mark:
        _marks(after)
        with torch.no_grad():
            self._tier.read(parcel, memory)

    def save(self, parcel: Parcel, memory: Tensor, after: Sequence[Mark], moment: Moment) -> Copying:
        sums = checksum(memory[: rounded(parcel.nbytes)])  # here, by all cores
        return self._writer.submit(self._tier.write_from, parcel, memory, moment, sums)


def _views(parcel: Parcel, memory: Tensor) -> list[Tensor]:
    return parcel.views(lambda begin, end: memory[begin:end])


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
