"""What the C library keeps of freed memory."""

from __future__ import annotations

import ctypes
import functools
import platform

_ARENA_MAX = -8


@functools.cache
def one_arena() -> None:
    """Let threads that begin from now on use the memory that others freed, where the C library is glibc: evaluations that take turns would
    each keep what they have freed, some hundred megabytes.
    """
    if _glibc():
        _libc().mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; what is allocated next is slower by its page faults."""
    if _glibc():
        _libc().malloc_trim(0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.cache
def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
