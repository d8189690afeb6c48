"""Where parcels are while they are used: in buffers of the device that computes, copied ahead, changed there, and copied home behind."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from zo_lightning.engine.noise import Noise
from zo_lightning.engine.offload.due import Due, make_in
from zo_lightning.engine.offload.lanes import Lanes, Mark
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.routes import Copying, Route
from zo_lightning.engine.offload.tiers import Tier

SPARE = 2
"""Buffers of a size at which no further one is made to copy ahead: for a block that computes, and for the next one."""


@dataclass(eq=False)
class Buffer:
    """Memory of the device, and what must have happened before it is written to again."""

    memory: Tensor
    pooled: bool
    """Whether it is used again."""
    after: list[Mark | Copying] = field(default_factory=list)
    versions: tuple[int, ...] = ()
    """Of the parcel's tensors when it was loaded: what was written to them since is not in the buffer."""


@dataclass
class Traffic:
    """What was moved since the run began: bytes of parcels that were used and written, seconds that computing waited for them."""

    read: int = 0
    written: int = 0
    waited: float = 0.0


class InBuffers:
    """Lends the tensors of parcels, with all their changes, in a few buffers of each size that are used again and again.

    Of what will follow, as many bytes are fetched ahead as the largest parcel has. An update is made in the buffer and copied home while
    the block computes; where that fails, it is due again, and `begin` of any parcel or `settle` raises what happened. `due` has the changes
    that each parcel still lacks, and belongs to the caller, too. A parcel is lent once at a time. Not to be called by two threads at once.
    """

    def __init__(self, tier: Tier, lanes: Lanes, route: Route, largest: int) -> None:
        self.tier, self.device = tier, lanes.device
        self.due: dict[Parcel, list[Due]] = {}
        self.traffic = Traffic()
        self._lanes, self._route, self._room = lanes, route, largest
        self._free: dict[int, deque[Buffer]] = {}
        self._lent: dict[Parcel, Buffer] = {}
        self._ahead: dict[Parcel, tuple[Buffer, Copying]] = {}
        self._saved: dict[Parcel, Copying] = {}
        """The last copy home of each parcel: what is loaded comes after it."""
        self._open: dict[Parcel, list[Due]] = {}
        """Changes of which it is not known yet whether they came home."""
        self.made: Counter[int] = Counter()
        """How many buffers there are of each size."""

    def begin(self, parcel: Parcel, noise: Noise, watched: bool) -> list[Tensor]:
        """Tensors with all changes, valid for what is computed from now on until `end`. Where it raises, nothing is lent or lost.

        `watched`: it is noted who reads them, so that views of them that outlive `end` must be told from what is lent later.
        """
        self._collect()
        began = time.perf_counter()
        buffer, loading = self._loaded(parcel, watched)
        try:
            mark = loading.result()
            self._collect()  # it came after the parcel's last copy home, of which it is known now whether it failed
            self._lanes.hold(mark)
            self.traffic.waited += time.perf_counter() - began + self._lanes.stalled()
            views = parcel.views(lambda begin, end: buffer.memory[begin:end])
            due = self.due.get(parcel)
            if due:
                make_in(parcel, due, views, noise)
                self._save(parcel, buffer, due)
        except BaseException:
            self._give(parcel, buffer)
            raise
        self._lent[parcel] = buffer
        return views

    def end(self, parcel: Parcel) -> None:
        """What was lent is not used any more."""
        self._give(parcel, self._lent.pop(parcel))

    def announce(self, parcels: Sequence[Parcel]) -> None:
        """These will follow, in this order."""
        for parcel in [parcel for parcel in self._ahead if parcel not in parcels]:
            self._give(parcel, self._ahead.pop(parcel)[0])
        room = self._room - sum(parcel.nbytes for parcel in self._ahead)
        for parcel in parcels:
            if parcel in self._ahead or parcel in self._lent:
                continue
            size = size_class(parcel, self._room)
            if parcel.nbytes > room or not (self._free.get(size) or self.made[size] < SPARE):
                return
            room -= parcel.nbytes
            self._ahead[parcel] = self._load(parcel, self._take(parcel))

    def settle(self) -> None:
        """Wait until all that was changed is at home; forget what was fetched ahead. OSError where it can't be written."""
        for parcel in list(self._ahead):
            self._give(parcel, self._ahead.pop(parcel)[0])
        self._collect(wait=True)

    def _loaded(self, parcel: Parcel, watched: bool) -> tuple[Buffer, Copying]:
        """A buffer, and the copy of the parcel into it."""
        if parcel in self._ahead:
            buffer, loading = self._ahead.pop(parcel)
            if not watched and buffer.versions == _versions(parcel):
                return buffer, loading
            self._give(parcel, buffer)
        # where it is watched, a view that outlives what was lent keeps its memory, which belongs to no buffer, from being used again
        return self._load(parcel, self._made(parcel.nbytes, pooled=False) if watched else self._take(parcel))

    def _made(self, nbytes: int, pooled: bool) -> Buffer:
        return Buffer(self._lanes.empty(nbytes), pooled, [self._lanes.mark()])  # the memory may still be used by what was computed

    def _take(self, parcel: Parcel) -> Buffer:
        """The one that was given back first, or one that was filled ahead for another parcel; a new one where there is none."""
        size = size_class(parcel, self._room)
        free = self._free.setdefault(size, deque())
        if not free:
            other = next((other for other in self._ahead if size_class(other, self._room) == size), None)
            if other is not None:
                self._give(other, self._ahead.pop(other)[0])
        if free:
            return free.popleft()
        self.made[size] += 1
        return self._made(size, pooled=True)

    def _give(self, parcel: Parcel, buffer: Buffer) -> None:
        buffer.after.append(self._lanes.mark())
        if buffer.pooled:
            self._free[size_class(parcel, self._room)].append(buffer)

    def _load(self, parcel: Parcel, buffer: Buffer) -> tuple[Buffer, Copying]:
        buffer.versions = _versions(parcel)
        after = [*buffer.after, *([self._saved[parcel]] if parcel in self._saved else [])]
        loading, buffer.after = self._route.load(parcel, buffer.memory, after), []
        self.traffic.read += parcel.nbytes
        return buffer, loading

    def _save(self, parcel: Parcel, buffer: Buffer, due: list[Due]) -> None:
        copying = self._route.save(parcel, buffer.memory, [self._lanes.mark()], due[-1].moment)
        self._saved[parcel] = copying
        self._open[parcel] = self.due.pop(parcel)
        buffer.after.append(copying)
        self.traffic.written += parcel.nbytes

    def _collect(self, wait: bool = False) -> None:
        """Take note of copies home that ended; changes that did not come home are due again."""
        errors = []
        for parcel in [parcel for parcel in self._open if wait or self._saved[parcel].done()]:
            due, error = self._open.pop(parcel), self._saved[parcel].exception()
            if error is not None:
                errors.append(error)
                self.due[parcel] = due + self.due.get(parcel, [])
        while wait and self._saved:
            _, copying = self._saved.popitem()
            if copying.exception() is None:
                self._lanes.join(copying.result())
        if errors:
            raise errors[0]


def _versions(parcel: Parcel) -> tuple[int, ...]:
    return tuple(p.tensor._version for p in parcel.tensors)


def size_class(parcel: Parcel, largest: int) -> int:
    """The size of the buffers that it may be in: large ones share theirs, so that a model with a few sizes does not need two of each."""
    return largest if 2 * parcel.nbytes > largest else parcel.nbytes
