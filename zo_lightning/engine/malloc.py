"""What the C library keeps of freed memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import sys
from pathlib import Path

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3
_STATM = Path("/proc/self/statm")


@functools.cache
def one_arena() -> None:
    """Let threads that begin from now on use the memory that others freed, where the C library is glibc: evaluations that take turns would
    each keep what they have freed, some hundred megabytes.
    """
    if _glibc():
        _libc().mallopt(_ARENA_MAX, 1)


@functools.cache
def blocks_apart() -> None:
    """Let the memory of tensors of 128 KiB and more go back to the system when they are freed, where the C library is glibc.

    It would learn from the first ones to keep what lies between others: FSDP2 frees what it has gathered for one module after another, and
    a process on a CPU ended up with as much memory as the whole model.
    """
    if _glibc():
        _libc().mallopt(_MMAP_THRESHOLD, 1 << 17)


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; what is allocated next is slower by its page faults."""
    if _glibc():
        _libc().malloc_trim(0)


class Grown:
    """Gives freed memory back where the process has grown by it.

    Evaluations that take turns free what lies between tensors of the others, in holes that malloc keeps: how many, depends on the order in
    which threads come. After a return the process has what it uses; what it has more of, later, is used or kept.
    """

    def __init__(self) -> None:
        self._least = sys.maxsize

    def give_back(self, above: int) -> None:
        """Return freed memory if the process has over `above` bytes more than it had the last time, or since then at the least."""
        if not _glibc():
            return
        if _anonymous() - self._least > above:
            give_back()
            self._least = sys.maxsize
        self._least = min(self._least, _anonymous())


def _anonymous() -> int:
    """Bytes of this process that are in memory and of no file."""
    _, resident, shared, *_ = _STATM.read_bytes().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.cache
def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
