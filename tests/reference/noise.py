"""The documented noise over whole tensors: seeds and streams from BLAKE2b, signs and Box-Muller pairs from Threefry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from reference.threefry import threefry_array

Values = NDArray[np.float64]
HALF = 2**18


def _blake2b(label: str, *numbers: int) -> bytes:
    return hashlib.blake2b(b"".join(n.to_bytes(8, "little") for n in numbers), digest_size=16, person=label.encode()).digest()


def query_seed(run_seed: int, step: int, query: int) -> int:
    """63 bits for the perturbation of `query` at `step`."""
    return int.from_bytes(_blake2b("zo.query", run_seed, step, query)[:8], "little") // 2


def evaluation_seed(run_seed: int, step: int, micro_batch: int, rank: int = 0) -> int:
    """63 bits for the host's generators during a micro-batch."""
    return int.from_bytes(_blake2b("zo.eval", run_seed, step, micro_batch, rank)[:8], "little") // 2


def parameter_key(name: str) -> int:
    """64 bits of a canonical name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=b"zo.param").digest(), "little")


def stream(seed: int, key: int) -> tuple[int, int, int]:
    """(k0, k1, c1): the key of Threefry and the high word of its counter."""
    digest = _blake2b("zo.noise", seed, key)
    k0, k1, c1 = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8))
    return k0, k1, c1


def _hash(seed: int, key: int, counters: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    k0, k1, c1 = stream(seed, key)
    return threefry_array(counters.astype(np.uint32), c1, k0, k1)


def rademacher(seed: int, key: int, index: NDArray[np.int64]) -> Values:
    """z[i] is +1 where bit i mod 64 of the 64-bit hash of i // 64 is set, else -1; the first word holds the low bits."""
    low, high = _hash(seed, key, index // 64)
    word = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return np.where(word >> (index % 64).astype(np.uint64) & np.uint64(1), 1.0, -1.0)


def gaussian(seed: int, key: int, index: NDArray[np.int64]) -> Values:
    """Box-Muller over blocks of 2**19 elements: the cosines are the first half of a block, the sines the second.

    Radius sqrt(-2 ln u) with u = (top 24 bits of the first word + 1) / 2**24; angle = pi * (second word, signed) / 2**31.
    """
    block, within = np.divmod(index, 2 * HALF)
    first, second = _hash(seed, key, block * HALF + within % HALF)
    radius = np.sqrt(-2 * np.log(((first >> np.uint32(8)).astype(np.float64) + 1) / 2**24))
    angle = np.pi * second.view(np.int32).astype(np.float64) / 2**31
    return radius * np.where(within < HALF, np.cos(angle), np.sin(angle))


NOISES: dict[str, Callable[[int, int, NDArray[np.int64]], Values]] = {"rademacher": rademacher, "gaussian": gaussian}


def whole(noise: str, seed: int, name: str, count: int) -> Values:
    """z for all `count` elements of the parameter called `name`."""
    return NOISES[noise](seed, parameter_key(name), np.arange(count))
