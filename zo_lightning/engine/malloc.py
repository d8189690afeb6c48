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
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
