"""Stochastic rounding element by element in float64: the documented dither, and theta + change on the grid of 16-bit weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reference.noise import Values, _blake2b
from reference.threefry import threefry_array

SIGNIFICAND = {"bfloat16": 8, "float16": 11}
LEAST = {"bfloat16": 2.0**-100, "float16": 2.0**-24}


def rounding_seed(run_seed: int, step: int) -> int:
    """63 bits for the rounding of the update of `step`."""
    return int.from_bytes(_blake2b("zo.round", run_seed, step)[:8], "little") // 2


def dither(seed: int, key: int, count: int) -> NDArray[np.float32]:
    """frac(a lane + b) - with a and b from the hash of each block of 64 - in [-1/2, 1/2]."""
    digest = _blake2b("zo.round", seed, key)
    k0, k1, c1 = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4, 8))
    x0, x1 = threefry_array(np.arange(-(-count // 64), dtype=np.uint32), c1, k0, k1)
    a = np.repeat((x0 >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24), 64)[:count]
    b = np.repeat((x1 >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24) + np.float32(2.0**-25), 64)[:count]
    x = a * (np.arange(count) % 64).astype(np.float32)
    w = (x - np.floor(x)) + b
    return np.asarray(w - np.rint(w), dtype=np.float32)


def unit(values: Values, dtype: str) -> Values:
    """The spacing of `dtype` in the binade of each value."""
    _, exponent = np.frexp(np.abs(values))
    return np.asarray(np.maximum(np.ldexp(1.0, exponent - SIGNIFICAND[dtype]), LEAST[dtype]))


def rounded(base: Values, change: Values, dithered: Values, dtype: str) -> Values:
    """(base + change) / unit + dither, to the nearest integer, times unit."""
    spacing = unit(base + change, dtype)
    return np.asarray(np.rint((base + change) / spacing + dithered) * spacing)
