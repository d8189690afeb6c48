"""Threefry-2x32-20, the counter-based generator of Salmon et al. 2011 (Random123), in plain int32 torch operations."""

from __future__ import annotations

from torch import Tensor

from zo_lightning.engine.noise.compiling import kernel

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA


def _rotate_left(x: Tensor, k: int) -> Tensor:
    return (x << k) | ((x >> (32 - k)) & ((1 << k) - 1))


def threefry(c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    """The two int32 words of the permutation under key (k0, k1) at counter (c0, c1); shapes broadcast.

    int32 addition wraps, as the generator wants. Right shifts of int32 carry the sign, hence the mask in the rotation.
    """
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = c0 + k0, c1 + k1
    for r in range(20):
        x0 = x0 + x1
        x1 = _rotate_left(x1, _ROTATIONS[r % 8]) ^ x0
        if r % 4 == 3:
            j = r // 4 + 1
            x0 = x0 + keys[j % 3]
            x1 = x1 + keys[(j + 1) % 3] + j
    return x0, x1


@kernel
def fused_threefry(c0: Tensor, c1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    """The same in one compiled kernel."""
    return threefry(c0, c1, k0, k1)
