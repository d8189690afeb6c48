"""The documented noise over whole tensors: seeds and streams from BLAKE2b, signs and Box-Muller pairs from Threefry."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

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


def stream(seed: int, key: int, label: str = "zo.noise") -> tuple[int, int, int]:
    """(k0, k1, c1): the key of Threefry and the high word of its counter."""
    digest = _blake2b(label, seed, key)
    k0, k1, c1 = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8))
    return k0, k1, c1


def _hash(seed: int, key: int, counters: NDArray[np.int64], label: str = "zo.noise") -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    k0, k1, c1 = stream(seed, key, label)
    return threefry_array(counters.astype(np.uint32), c1, k0, k1)


def rademacher(seed: int, key: int, index: NDArray[np.int64]) -> Values:
    """z[i] is +1 where bit i mod 64 of the 64-bit hash of i // 64 is set, else -1; the first word holds the low bits."""
    low, high = _hash(seed, key, index // 64)
    word = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return np.where(word >> (index % 64).astype(np.uint64) & np.uint64(1), 1.0, -1.0)


def gaussian(seed: int, key: int, index: NDArray[np.int64], label: str = "zo.noise") -> Values:
    """Box-Muller over blocks of 2**19 elements: the cosines are the first half of a block, the sines the second.

    Radius sqrt(-2 ln u) with u = (top 24 bits of the first word + 1) / 2**24; angle = pi * (second word, signed) / 2**31.
    """
    block, within = np.divmod(index, 2 * HALF)
    first, second = _hash(seed, key, block * HALF + within % HALF, label)
    radius = np.sqrt(-2 * np.log(((first >> np.uint32(8)).astype(np.float64) + 1) / 2**24))
    angle = np.pi * second.view(np.int32).astype(np.float64) / 2**31
    return radius * np.where(within < HALF, np.cos(angle), np.sin(angle))


def paired(seed: int, key: int, count: int, label: str = "zo.noise") -> Values:
    """Box-Muller whose hash i gives value i, a cosine, and value ceil(count / 2) + i, a sine."""
    half = -(-count // 2)
    first, second = _hash(seed, key, np.arange(half), label)
    radius = np.sqrt(-2 * np.log(((first >> np.uint32(8)).astype(np.float64) + 1) / 2**24))
    angle = np.pi * second.view(np.int32).astype(np.float64) / 2**31
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def sphere(seed: int, key: int, shape: Sequence[int]) -> Values:
    """Gaussian values of the length sqrt(n)."""
    x = gaussian(seed, key, np.arange(math.prod(shape)))
    return x * math.sqrt(x.size / float((x * x).sum()))


def low_rank(seed: int, key: int, shape: Sequence[int], rank: int = 2, refresh: int = 50, orthogonal: bool = False) -> Values:
    """A matrix (m, n) is U V' / sqrt(r), or sqrt(m n) / r U S V' with orthonormal U, V; the bits of the seed from 40 up are the basis's."""
    m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if min(m, n) < 2:
        return paired(seed, key, m * n) if m * n <= 2**15 else gaussian(seed, key, np.arange(m * n))
    r, basis = min(rank, m, n), seed if refresh == 1 and not orthogonal else seed // 2**40
    if orthogonal:
        drawn = paired(basis, key, (m + n) * r, "zo.basis")
        u, v = (_orthonormal(part.reshape(-1, r)) for part in (drawn[: m * r], drawn[m * r :]))
        core = paired(seed, key, r * r).reshape(r, r)
        return (math.sqrt(m * n) / r * (u @ core @ v.T)).ravel()
    u = paired(seed, key, m * r).reshape(m, r)
    v = paired(basis, key, n * r, "zo.basis").reshape(n, r)
    return (u @ v.T / math.sqrt(r)).ravel()


def _orthonormal(columns: Values) -> Values:
    """Gram and Schmidt's."""
    found: list[Values] = []
    for column in columns.T:
        rest = column - sum((q * (q @ column) for q in found), np.zeros_like(column))
        rest = rest - sum((q * (q @ rest) for q in found), np.zeros_like(column))
        found.append(rest / np.linalg.norm(rest))
    return np.stack(found, axis=1)


NOISES: dict[str, Callable[[int, int, NDArray[np.int64]], Values]] = {"rademacher": rademacher, "gaussian": gaussian}


def whole(noise: str, seed: int, name: str, count: int) -> Values:
    """z for all `count` elements of the parameter called `name`."""
    return NOISES[noise](seed, parameter_key(name), np.arange(count))
