"""The disk tier: each parcel in a slot of its own, and spare slots, so that a write that is cut off never hits what is valid."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zo_lightning.engine.offload.mapped import PAGE, Mapped, forget
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.sources import Source, source_of
from zo_lightning.engine.offload.tiers import Tier

try:
    import fcntl
except ImportError:  # Windows, where nothing of this is used
    fcntl = None  # type: ignore[assignment]

VERSION = 1
_PIECE = 1 << 20
"""Words that are summed up together."""


class Slot:
    """A file with room for one parcel, whole pages, and behind it a stamp: which parcel, after how many steps, and the checksum."""

    def __init__(self, path: Path, nbytes: int, descriptors: list[int]) -> None:
        self.path, self.nbytes = path, nbytes
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        descriptors.append(self.descriptor)
        os.posix_fallocate(self.descriptor, 0, self.nbytes + PAGE)  # a full disk is an error now, not in the middle of a run

    def stamp(self, **words: object) -> None:
        """Say what the slot has now."""
        os.pwrite(self.descriptor, json.dumps(words).encode().ljust(PAGE, b"\0"), self.nbytes)


def checksum(memory: Tensor) -> str:
    """The sum and the weighted sum of all 64-bit words, modulo 2**64: other ones where an older piece stands among the rest."""
    words = memory.view(torch.int64)
    total, weighted = 0, 0
    for number, piece in enumerate(words.split(_PIECE), 1):
        some = int(piece.sum())
        total, weighted = total + some, weighted + number * some
    return f"{total % 2**64:016x}{weighted % 2**64:016x}"


class DiskTier(Tier):
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
        descriptors = [lock]
        self._leave = weakref.finalize(self, _close, descriptors)
        slots = []
        try:
            for number, size in enumerate(sizes):
                slots.append(Slot(self.folder / f"slot-{number:05d}.bin", size, descriptors))
        except OSError as error:
            why = f"There is no room for {sum(sizes) / 1e6:.1f} MB of weights in {self.folder}: {error.strerror}"
            raise OSError(error.errno, why) from error
        self._free: dict[int, list[Slot]] = {size: [slot for slot in slots if slot.nbytes == size] for size in wanted}
        self._drafts = {size: Mapped(free[-1].descriptor, size) for size, free in self._free.items()}
        self._slots: dict[Parcel, Slot] = {}
        self._maps: dict[Parcel, Mapped] = {}
        self._homes: dict[Parcel, list[Tensor]] = {}
        self._sources: dict[Parcel, list[Source]] = {}
        for parcel in parcels:
            self._settle(parcel)
        _describe(self.folder, parcels)

    def close(self) -> None:
        """Leave the folder to others. What is mapped stays so, but slots can't be used any more."""
        self._leave()

    def _settle(self, parcel: Parcel) -> None:
        tensors = [p.tensor.detach() for p in parcel.tensors]
        sources = [source for p in parcel.tensors if (source := source_of(p.tensor)) is not None]
        if len(sources) == len(tensors):
            self._sources[parcel], self._homes[parcel] = sources, tensors
            return
        self.write(parcel, tensors, 0)

    def write(self, parcel: Parcel, places: Sequence[Tensor], step: int) -> None:
        for draft, place in zip(self.draft(parcel), places, strict=True):
            draft.copy_(place)
        self.commit(parcel, step)

    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are in the file: to be read and written anywhere, at addresses that stay after the first `commit`."""
        return self._homes[parcel]

    def moved_in(self, parcel: Parcel) -> bool:
        """Whether it has a slot, in which its tensors are aligned; otherwise it is still in safetensors files."""
        return parcel in self._slots

    def announce(self, parcel: Parcel) -> None:
        """It will be used soon: the system may get it from the disk meanwhile."""
        if parcel in self._slots:
            os.posix_fadvise(self._slots[parcel].descriptor, 0, parcel.nbytes, os.POSIX_FADV_WILLNEED)
            return
        for p, source in zip(parcel.tensors, self._sources[parcel], strict=True):
            descriptor = os.open(source.path, os.O_RDONLY)
            os.posix_fadvise(descriptor, source.offset, p.tensor.nbytes, os.POSIX_FADV_WILLNEED)
            os.close(descriptor)

    def fetch(self, parcel: Parcel) -> None:
        """Wait until it is in memory."""
        if parcel in self._maps:
            self._maps[parcel].fetch()

    def forget(self, parcel: Parcel) -> None:
        """Take the pages that were used at home out of the process's memory."""
        if parcel in self._maps:
            self._maps[parcel].forget()
        else:
            for tensor in self._homes[parcel]:
                forget(tensor)

    def draft(self, parcel: Parcel) -> list[Tensor]:
        """Tensors like the parcel's in a slot that nobody uses, to be filled before `commit`."""
        size = _rounded(parcel)
        self._drafts[size].move(self._free[size][-1].descriptor)
        self._drafts[size].fetch(write=True)
        return parcel.views(self._drafts[size].stretch)

    def commit(self, parcel: Parcel, step: int) -> None:
        """What was written to the draft is the parcel after `step` steps, from now on; what it was before is kept until the next draft."""
        size = _rounded(parcel)
        words = checksum(self._drafts[size].stretch(0, size))
        slot, old = self._free[size][-1], self._slots.get(parcel)
        slot.stamp(version=VERSION, parcel=parcel.name, step=step, checksum=words)
        self._drafts[size].forget()
        if parcel in self._maps:
            self._maps[parcel].move(slot.descriptor)
        else:
            self._maps[parcel] = Mapped(slot.descriptor, slot.nbytes)
            self._homes[parcel] = parcel.views(self._maps[parcel].stretch)
        self._slots[parcel] = self._free[size].pop()
        if old is not None:
            self._free[size].append(old)


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
