"""The disk tier: each parcel in a slot of its own, and spare slots, so that a write that is cut off never hits what is valid."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_lightning.engine.offload.mapped import PAGE, Mapped
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.sources import Source, source_of

VERSION = 1
_PIECE = 1 << 26
"""Bytes of one read or write; the system takes at most 2 GiB at a time."""


class Slot:
    """A file with room for one parcel, and behind it a stamp: which parcel, after how many steps, and the checksum."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, -(-nbytes // PAGE) * PAGE
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self.descriptor, 0, self.nbytes + PAGE)  # a full disk is an error now, not in the middle of a run

    def write(self, memory: Tensor, stamp: dict[str, Any]) -> None:
        """The weights, then the stamp."""
        view = memoryview(memory.numpy())
        checksum = 0
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            checksum = zlib.crc32(piece, checksum)
            if os.pwritev(self.descriptor, [piece], at) != len(piece):
                raise OSError(f"{self.path} could not be written as a whole. Is the disk full?")
        text = json.dumps({**stamp, "checksum": checksum}).encode()
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

    def read(self, parcel: Parcel, memory: Tensor) -> None:
        """The parcel's bytes. Blocks."""
        slot = self._slots.get(parcel)
        if slot is not None:
            _read(slot.descriptor, 0, memory[: parcel.nbytes], slot.path)
            return
        for p, offset, source in zip(parcel.tensors, parcel.offsets, self._sources[parcel], strict=True):
            descriptor = os.open(source.path, os.O_RDONLY)
            try:
                _read(descriptor, source.offset, memory[offset : offset + p.tensor.nbytes], source.path)
            finally:
                os.close(descriptor)

    def write(self, parcel: Parcel, memory: Tensor, step: int) -> None:
        """The parcel's bytes after `step` steps, into a free slot, which is its own from then on. Blocks."""
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


def _read(descriptor: int, start: int, memory: Tensor, path: object) -> None:
    view = memoryview(memory.numpy())
    for at in range(0, len(view), _PIECE):
        piece = view[at : at + _PIECE]
        if os.preadv(descriptor, [piece], start + at) != len(piece):
            raise OSError(f"{path} is shorter than it was; its weights are lost.")


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
