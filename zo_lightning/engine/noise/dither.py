"""Dither: float32 numbers u[i] in [-1/2, 1/2], two words of one hash for 64 of them; for stochastic rounding and for masks by chance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Stretch, constants, counters, pieces
from zo_lightning.engine.noise.compiling import dispatch, kernel
from zo_lightning.engine.noise.threefry import fused_threefry, threefry

BLOCK = 64
"""Elements whose dither comes from one hash."""


def _pairs(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of a hash as multiples of 2**-24 in [0, 1), and as odd multiples of 2**-25 in (0, 1)."""
    return ((x0 >> 8) & 0xFFFFFF).float() * 2.0**-24, ((x1 >> 8) & 0xFFFFFF).float() * 2.0**-24 + 2.0**-25


def _lane(a: Tensor, b: Tensor, lane: Tensor) -> Tensor:
    """frac(a lane + b) in [-1/2, 1/2]: uniform, and independent for any two lanes of a block because a and b are."""
    x = a * lane
    x = (x - x.floor()) + b
    return x - x.round()


fused_lane = kernel(_lane)
"""The same in one compiled pass."""


def dither(keys: Tensor, stretches: Sequence[Stretch], fused: bool = False) -> Tensor:
    """float32 in [-1/2, 1/2] for every element of the stretches, concatenated; `keys` as for `Noise.values`."""
    blocks = [(row, first // BLOCK, (first + length - 1) // BLOCK - first // BLOCK + 1) for row, first, length in stretches]
    a, b = _pairs(*(fused_threefry if fused else threefry)(*counters(keys, blocks)))
    every = (fused_lane if fused else _lane)(a[:, None], b[:, None], lanes(keys.device)).view(-1)
    return pieces(every, BLOCK, stretches)


@functools.cache
def lanes(device: torch.device) -> Tensor:
    """0, 1, ..., 63 in float32. Kernels take it as an argument: made inside, it costs them as much as the rest of the dither."""
    return torch.arange(BLOCK, device=device).float()


def dither_at(index: Tensor, key: Tensor) -> Tensor:
    """The dither of the elements `index` (int64, any shape) of one stream."""
    found: Tensor = dispatch(_dither_at, index.device)(index, key)
    return found


@kernel
def _dither_at(index: Tensor, key: Tensor) -> Tensor:
    a, b = _pairs(*threefry((index >> 6).int(), key[2], key[0], key[1]))
    return _lane(a, b, (index & (BLOCK - 1)).float())


class Dithers(NamedTuple):
    """What a kernel needs for the dither of n blocks: room for their pairs (2, n), `lanes` as (2, 32), the first block, the key."""

    pairs: Tensor
    lane: Tensor
    first: Tensor
    key: Tensor

    @staticmethod
    def of(blocks: int, start: int, key: Tensor) -> Dithers:
        """For blocks from element `start` on, a multiple of 64, of the stream `key`."""
        device = key.device
        return Dithers(
            torch.empty(2, blocks, device=device), lanes(device).view(2, 32), constants(start // BLOCK, torch.int32, device), key
        )

    def values(self) -> Tensor:
        """(n, 2, 32), inside a kernel."""
        c0 = torch.arange(self.pairs.shape[1], dtype=torch.int32, device=self.key.device) + self.first
        for pair, word in zip(self.pairs, _pairs(*threefry(c0, self.key[2], self.key[0], self.key[1])), strict=True):
            pair.copy_(word)
        return _lane(self.pairs[0][:, None, None], self.pairs[1][:, None, None], self.lane)
