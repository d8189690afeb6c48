"""Files as memory, at addresses that stay the same when other files take their place."""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_SHARED, _FIXED, _READ_WRITE = 0x01, 0x10, mmap.PROT_READ | mmap.PROT_WRITE
_DONT_NEED = 4


class Mapped:
    """`nbytes` bytes of a file as memory: what is written there is in the file, and the other way round.

    Pages count for the process from their first use on, until `forget`. The memory is there as long as this or a stretch of it.
    OSError where the system refuses.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self._nbytes = nbytes
        self.move(descriptor)

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def stretch(self, begin: int, end: int) -> Tensor:
        """Some bytes (uint8), with a storage of their own, so that a tensor in them is saved by itself."""
        return torch.frombuffer(memoryview(self._memory)[begin:end], dtype=torch.uint8)

    def move(self, descriptor: int) -> None:
        """Another file from now on, at the same address."""
        found = _libc().mmap(self._address(), self._nbytes, _READ_WRITE, _SHARED | _FIXED, descriptor, 0)
        if found in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"A file of weights of {self._nbytes} bytes could not be mapped into memory")

    def forget(self) -> None:
        """The process does not need the pages just now; what was written is in the file."""
        _libc().madvise(self._address(), self._nbytes, _DONT_NEED)


def forget(tensor: Tensor) -> None:
    """Take the whole pages of a tensor, in a private map of a file that nobody has written to, out of the process's memory."""
    begin = -(-tensor.data_ptr() // PAGE) * PAGE
    nbytes = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - begin
    if nbytes > 0:
        _libc().madvise(begin, nbytes, _DONT_NEED)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
