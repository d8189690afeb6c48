"""Parcels on their way: read ahead of their use on one thread, written behind it on another, in a few buffers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zo_lightning.engine.offload.parcels import Parcel


class Tier(Protocol):
    """Where parcels are while nobody uses them."""

    def read(self, parcel: Parcel, memory: Tensor) -> None: ...

    def write(self, parcel: Parcel, memory: Tensor, step: int) -> None: ...


@dataclass
class Traffic:
    """What was moved since the run began: bytes read and written, seconds that somebody waited for a parcel."""

    read: int = 0
    written: int = 0
    waited: float = 0.0


class Stream:
    """Lends parcels in memory. `bring_up(parcel, memory)` makes the changes that are due, and says after how many steps the parcel then is;
    None where there were none. `written(parcel, error)` is told when these are in the tier, or why they are not.
    """

    def __init__(
        self, tier: Tier, bring_up: Callable[[Parcel, Tensor], int | None], written: Callable[[Parcel, BaseException | None], None]
    ) -> None:
        self._tier, self._bring_up, self._written = tier, bring_up, written
        self._reader = ThreadPoolExecutor(1, "zo-read")
        self._writer = ThreadPoolExecutor(1, "zo-write")
        self._loading: dict[Parcel, Future[Tensor]] = {}
        self._lent: dict[Parcel, tuple[Tensor, int]] = {}
        self._writing: dict[Parcel, Future[None]] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._follows: dict[tuple[Parcel | None, Parcel], Parcel] = {}
        self._last: tuple[Parcel | None, Parcel | None] = (None, None)
        self._firsts: set[Parcel] = set()
        """Those that were taken while nothing was on its way: a forward pass begins with them. They are not read ahead, for between two
        passes weights may be written by others."""
        self.traffic = Traffic()

    def take(self, parcel: Parcel, following: Parcel | None = None) -> Tensor:
        """The parcel's bytes in memory, brought up to date, until as many calls of `give`.

        `following` is read ahead; None: what came next the last time.
        """
        if parcel in self._lent:
            memory, count = self._lent[parcel]
            self._lent[parcel] = (memory, count + 1)
            return memory
        self._collect()
        began = time.perf_counter()
        if not self._loading:
            self._firsts.add(parcel)
        memory = self._load(parcel).result()
        self.traffic.waited += time.perf_counter() - began
        del self._loading[parcel]
        self._lent[parcel] = (memory, 1)
        step = self._bring_up(parcel, memory)
        if step is not None:
            self._collect(wait=True)  # one write at a time bounds the memory
            self._lent[parcel] = (memory, 2)
            self._writing[parcel] = self._writer.submit(self._tier.write, parcel, memory, step)
            self.traffic.written += parcel.nbytes
        self._look_ahead(parcel) if following is None else self._load(following)
        return memory

    def give(self, parcel: Parcel) -> None:
        """One user less."""
        memory, count = self._lent.pop(parcel)
        if count > 1:
            self._lent[parcel] = (memory, count - 1)
        else:
            self._free.setdefault(len(memory), []).append(memory)

    def being_written(self, parcel: Parcel) -> bool:
        """Whether the memory that was lent is just read by the writer: it must not be changed."""
        return parcel in self._writing

    def drop(self) -> None:
        """What was read ahead is not used: weights may be written by others from now on."""
        for future in self._loading.values():
            memory = future.result()
            self._free.setdefault(len(memory), []).append(memory)
        self._loading = {}

    def drain(self) -> None:
        """Wait for all writes. OSError of one that failed."""
        self._collect(wait=True)

    def _look_ahead(self, parcel: Parcel) -> None:
        before, last = self._last
        if last is not None:
            self._follows[before, last] = parcel
        self._last = (last, parcel)
        following = self._follows.get((last, parcel))
        if following is not None and following not in self._lent and following not in self._firsts:
            self._load(following)

    def _load(self, parcel: Parcel) -> Future[Tensor]:
        if parcel not in self._loading:
            free = self._free.get(parcel.nbytes)
            memory = free.pop() if free else torch.empty(parcel.nbytes, dtype=torch.uint8)
            self._loading[parcel] = self._reader.submit(self._read, parcel, memory, self._writing.get(parcel))
            self.traffic.read += parcel.nbytes
        return self._loading[parcel]

    def _read(self, parcel: Parcel, memory: Tensor, before: Future[None] | None) -> Tensor:
        if before is not None:
            before.exception()  # it is read once its own write has ended
        self._tier.read(parcel, memory)
        return memory

    def _collect(self, wait: bool = False) -> None:
        """Take leave of the writes that ended."""
        ended = [parcel for parcel, future in self._writing.items() if wait or future.done()]
        errors = []
        for parcel in ended:
            error = self._writing.pop(parcel).exception()
            self.give(parcel)
            self._written(parcel, error)
            errors += [] if error is None else [error]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads."""
        self._reader.shutdown()
        self._writer.shutdown()
