"""Transfers of whole pages between files and memory, past the system's cache where the file system can: they take no time of cores."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.offload.mapped import PAGE


def pages(nbytes: int) -> Tensor:
    """`nbytes` bytes of memory (uint8) in whole pages of its own, zeros."""
    return torch.frombuffer(mmap.mmap(-1, rounded(nbytes)), dtype=torch.uint8)


def rounded(nbytes: int) -> int:
    """The size of the whole pages that `nbytes` bytes take."""
    return -(-nbytes // PAGE) * PAGE


def open_direct(path: Path) -> int | None:
    """A descriptor of a file with a whole page, whose transfers go past the system's cache; None where the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    page = pages(PAGE)
    try:
        transfer(os.preadv, descriptor, page, PAGE)
    except OSError:  # some say so when it is tried
        os.close(descriptor)
        return None
    return descriptor


def transfer(call: Callable[[int, list[Any], int], int], descriptor: int, memory: Tensor, nbytes: int) -> None:
    """Read (os.preadv) or write (os.pwritev) the first `nbytes` bytes of a file, whole pages. OSError where it fails or the file ends."""
    done = 0
    while done < nbytes:
        count = call(descriptor, [_window(memory, done, nbytes)], done)
        if count <= 0:
            raise OSError(f"A file of weights ends after {done} of {nbytes} bytes: it was cut off.")
        done += count


def _window(memory: Tensor, begin: int, end: int) -> Any:
    return (ctypes.c_uint8 * (end - begin)).from_address(memory.data_ptr() + begin)
