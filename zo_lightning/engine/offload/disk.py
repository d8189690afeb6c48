"""The disk tier: each parcel in a slot of its own, and spare slots, so that a write that is cut off never hits what is valid."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from zo_lightning.engine.offload.mapped import PAGE, Mapped, forget
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.sources import Source, source_of

VERSION = 1
_PIECE = 1 << 22
"""Bytes that one core copies at a time; after a write they are still in the cache to be summed up."""


class Checksum(NamedTuple):
    """The sum and the exclusive or of all 64-bit words, at the speed of memory: other ones where an older piece stands among the rest."""

    total: int = 0
    xor: int = 0

    @staticmethod
    def of(piece: memoryview) -> Checksum:
        """Of some bytes, a multiple of 8."""
        words = numpy.frombuffer(piece, dtype=numpy.uint64)
        return Checksum(int(words.sum(dtype=numpy.uint64)), int(numpy.bitwise_xor.reduce(words)))

    def __add__(self, other: Checksum) -> Checksum:  # type: ignore[override]
        """Of the bytes of both."""
        return Checksum((self.total + other.total) % 2**64, self.xor ^ other.xor)

    @property
    def text(self) -> str:
        """32 hexadecimal digits."""
        return f"{self.total:016x}{self.xor:016x}"


class Slot:
    """A file with room for one parcel, and behind it a stamp: which parcel, after how many steps, and the checksum."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, -(-nbytes // PAGE) * PAGE
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self.descriptor, 0, self.nbytes + PAGE)  # a full disk is an error now, not in the middle of a run

    def write(self, memory: Tensor, stamp: dict[str, Any]) -> None:
        """The weights, then the stamp."""
        view = memoryview(memory.numpy())

        def piece(begin: int) -> Checksum:
            some = view[begin : begin + _PIECE]
            if os.pwritev(self.descriptor, [some], begin) != len(some):
                raise OSError(f"{self.path} could not be written as a whole. Is the disk full?")
            return Checksum.of(some)

        checksum = sum(_copiers().map(piece, range(0, len(view), _PIECE)), Checksum())
        text = json.dumps({**stamp, "checksum": checksum.text}).encode()
        os.pwrite(self.descriptor, text.ljust(PAGE, b"\0"), self.nbytes)


class DiskTier:
    """Parcels in files of a folder, which is a temporary one where it is None. OSError where they can't be made.

    There is room for all parcels and, of each size, one more. What comes from safetensors files stays there until it is first written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, parcels: Sequence[Parcel]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zo-offload-") if folder is None else folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        lock = _locked(self.folder)
        wanted = Counter(_rounded(parcel) for parcel in parcels)
        sizes = [size for size, count in sorted(wanted.items()) for _ in range(count + 1)]
        slots = [Slot(self.folder / f"slot-{number:05d}.bin", size) for number, size in enumerate(sizes)]
        weakref.finalize(self, _close, [lock, *(slot.descriptor for slot in slots)])
        self._free: dict[int, list[Slot]] = {size: [slot for slot in slots if slot.nbytes == size] for size in wanted}
        self._slots: dict[Parcel, Slot] = {}
        self._maps: dict[Parcel, Mapped] = {}
        self._homes: dict[Parcel, list[Tensor]] = {}
        self._sources: dict[Parcel, list[Source]] = {}
        for parcel in parcels:
            self._settle(parcel)
        _describe(self.folder, parcels)

    def _settle(self, parcel: Parcel) -> None:
        tensors = [p.tensor.detach() for p in parcel.tensors]
        sources = [source for p in parcel.tensors if (source := source_of(p.tensor)) is not None]
        if len(sources) == len(tensors):
            self._sources[parcel], self._homes[parcel] = sources, tensors
            return
        self._move(parcel, self._free[_rounded(parcel)].pop())
        for home, tensor in zip(self._homes[parcel], tensors, strict=True):
            home.copy_(tensor)
        self.forget(parcel)

    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are in the file: to be read and written anywhere, at addresses that stay after the first `write`."""
        return self._homes[parcel]

    def forget(self, parcel: Parcel) -> None:
        """Take the pages that were used at home out of the process's memory."""
        if parcel in self._maps:
            self._maps[parcel].forget()
        else:
            for tensor in self._homes[parcel]:
                forget(tensor)

    def announce(self, parcel: Parcel) -> None:
        """It will be read soon: the system may get it from the disk meanwhile."""
        slot = self._slots.get(parcel)
        if slot is not None:
            _advise(slot.descriptor, 0, parcel.nbytes)
            return
        for p, source in zip(parcel.tensors, self._sources[parcel], strict=True):
            with _opened(source.path) as descriptor:
                _advise(descriptor, source.offset, p.tensor.nbytes)

    def read(self, parcel: Parcel, memory: Tensor) -> None:
        """The parcel's bytes."""
        slot = self._slots.get(parcel)
        if slot is not None:
            _read(slot.descriptor, 0, memory[: parcel.nbytes], slot.path)
            return
        for p, offset, source in zip(parcel.tensors, parcel.offsets, self._sources[parcel], strict=True):
            with _opened(source.path) as descriptor:
                _read(descriptor, source.offset, memory[offset : offset + p.tensor.nbytes], source.path)

    def write(self, parcel: Parcel, memory: Tensor, step: int) -> None:
        """The parcel's bytes after `step` steps, into a free slot, which is its own from then on."""
        free, old = self._free[_rounded(parcel)], self._slots.get(parcel)
        free[-1].write(memory[: parcel.nbytes], {"version": VERSION, "parcel": parcel.name, "step": step})
        self._move(parcel, free.pop())
        if old is not None:
            free.append(old)

    def _move(self, parcel: Parcel, slot: Slot) -> None:
        if parcel in self._maps:
            self._maps[parcel].move(slot.descriptor)
        else:
            self._maps[parcel] = Mapped(slot.descriptor, slot.nbytes)
            self._homes[parcel] = parcel.views(self._maps[parcel].stretch)
        self._slots[parcel] = slot


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _advise(descriptor: int, begin: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, begin, nbytes, os.POSIX_FADV_WILLNEED)


def _read(descriptor: int, start: int, memory: Tensor, path: object) -> None:
    view = memoryview(memory.numpy())

    def piece(begin: int) -> None:
        some = view[begin : begin + _PIECE]
        if os.preadv(descriptor, [some], start + begin) != len(some):
            raise OSError(f"{path} is shorter than it was; its weights are lost.")

    list(_copiers().map(piece, range(0, len(view), _PIECE)))


@functools.cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "zo-copy")


def _rounded(parcel: Parcel) -> int:
    return -(-parcel.nbytes // PAGE) * PAGE


def _locked(folder: Path) -> int:
    """The descriptor of a file that this process alone has locked, until it is closed."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"Another run has its weights in {folder}. Give each run a folder of its own.") from None
    return lock


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _describe(folder: Path, parcels: Sequence[Parcel]) -> None:
    entries = [
        {
            "name": parcel.name,
            "bytes": parcel.nbytes,
            "tensors": [
                {"name": p.name, "dtype": str(p.tensor.dtype)[6:], "shape": list(p.tensor.shape), "offset": offset}
                for p, offset in zip(parcel.tensors, parcel.offsets, strict=True)
            ],
        }
        for parcel in parcels
    ]
    (folder / "tier.json").write_text(json.dumps({"version": VERSION, "parcels": entries}, indent=1))
