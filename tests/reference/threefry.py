"""Threefry-2x32-20 (Salmon et al. 2011), in Python integers and, the same again, over NumPy arrays of uint32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

MASK = 0xFFFFFFFF
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

# (counter, key, output): the known-answer vectors that Random123 is distributed with (kat_vectors, threefry2x32 20).
KNOWN_ANSWERS = (
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
)


def threefry(counter: tuple[int, int], key: tuple[int, int]) -> tuple[int, int]:
    """Five times four rounds of add, rotate and xor, a key injection before the first and after each four."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x0 = (counter[0] + schedule[0]) & MASK
    x1 = (counter[1] + schedule[1]) & MASK
    for injection in range(1, 6):
        for rotation in ROTATIONS[(injection - 1) % 2]:
            x0 = (x0 + x1) & MASK
            x1 = ((x1 << rotation | x1 >> (32 - rotation)) & MASK) ^ x0
        x0 = (x0 + schedule[injection % 3]) & MASK
        x1 = (x1 + schedule[(injection + 1) % 3] + injection) & MASK
    return x0, x1


def threefry_array(c0: Words, c1: int, k0: int, k1: int) -> tuple[Words, Words]:
    """`threefry` at the counters (c0[i], c1)."""
    schedule = [np.uint32(word) for word in (k0, k1, k0 ^ k1 ^ PARITY)]
    x0 = c0 + schedule[0]
    x1 = np.full_like(c0, c1) + schedule[1]
    for injection in range(1, 6):
        for rotation in ROTATIONS[(injection - 1) % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation) | x1 >> np.uint32(32 - rotation)) ^ x0
        x0 = x0 + schedule[injection % 3]
        x1 = x1 + schedule[(injection + 1) % 3] + np.uint32(injection)
    return x0, x1
