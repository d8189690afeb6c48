"""Where randomness comes from: seeds as functions of (run, step, query), streams as functions of (seed, parameter)."""

from __future__ import annotations

import functools
import hashlib
import struct

_MASK64 = (1 << 64) - 1


def _digest(label: bytes, *numbers: int) -> bytes:
    packed = struct.pack(f"<{len(numbers)}Q", *(n & _MASK64 for n in numbers))
    return hashlib.blake2b(packed, digest_size=16, person=label).digest()


def query_seed(run_seed: int, step: int, query: int) -> int:
    """The 63-bit seed of the perturbation of `query` at `step`; the default seed source of `ZOOptimizer`."""
    return int.from_bytes(_digest(b"zo.query", run_seed, step, query)[:8], "little") >> 1


def basis_seed(run_seed: int, number: int) -> int:
    """The 63-bit seed of what the noise of some steps has in common (noise/low_rank.py)."""
    return int.from_bytes(_digest(b"zo.basis", run_seed, number)[:8], "little") >> 1


def evaluation_seed(run_seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The 63-bit seed of the host's generators (dropout and the like) while one micro-batch is evaluated."""
    return int.from_bytes(_digest(b"zo.eval", run_seed, step, micro_batch, rank)[:8], "little") >> 1


def parameter_key(name: str) -> int:
    """A 64-bit key of a canonical parameter name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=b"zo.param").digest(), "little")


def rounding_seed(run_seed: int, step: int) -> int:
    """The 63-bit seed of the stochastic rounding of the update of `step`."""
    return int.from_bytes(_digest(b"zo.round", run_seed, step)[:8], "little") >> 1


@functools.lru_cache(maxsize=1 << 13)
def stream(seed: int, key: int, label: bytes = b"zo.noise") -> tuple[int, int, int]:
    """Three signed 32-bit words that select the stream of one (seed, parameter key); another `label` is another family of streams.

    They are Threefry's two key words and the high word of its counter. Under one key, Threefry permutes the counters, so two streams
    could only share values if all 96 bits agreed.
    """
    return struct.unpack("<3i", _digest(label, seed, key)[:12])
