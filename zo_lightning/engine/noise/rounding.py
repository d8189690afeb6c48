"""Stochastic rounding of 16-bit weights: theta moves to one of its two neighbours, to each as often as makes the mean exact."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Stretch, counters, inside, part_of, pieces
from zo_lightning.engine.noise.compiling import dispatch, kernel
from zo_lightning.engine.noise.threefry import fused_threefry, threefry

BLOCK = 64
"""Elements whose dither comes from one hash."""
_BITS = {torch.bfloat16: (8, 2.0**-119), torch.float16: (11, 2.0**-14)}
"""Bits of the significand, and the binade below which the spacing stays the same: for float16 that of its subnormals."""


def rounds(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are rounded stochastically."""
    return dtype in _BITS


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


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` in the binade of the float32 `x`."""
    bits, least = _BITS[dtype]
    size = x.abs()
    size = size.clamp_min(least) if dtype == torch.float16 else size + least  # the sum is cheaper, and only felt near `least`
    return (first_by_rounding(size) if x.device.type == "cpu" else first_by_bits(size)) * 2.0 ** (1 - bits)


def first_by_rounding(x: Tensor) -> Tensor:
    """2**floor(log2 x) for x > 0 by Rump, Ogita and Oishi 2008 (Accurate floating-point summation I), if every rounding is kept.

    torch's compiler for CPUs keeps them, and does not vectorize bit casts; the one for GPUs fuses multiplications with additions.
    """
    q = x * (2.0**23 + 1)
    return q - q * (1 - 2.0**-24)


def first_by_bits(x: Tensor) -> Tensor:
    """The same from the exponent's bits."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def stochastic(base: Tensor, change: Tensor, dither: Tensor, dtype: torch.dtype) -> Tensor:
    """base + change rounded to `dtype` by adding `dither` units in the last place, in float32 that `dtype` holds exactly.

    E = base + change over dither uniform in [-1/2, 1/2], also where the change is a millionth of a unit: it meets the dither before the
    weight. A change of zero leaves weights of `dtype` as they are.
    """
    unit = spacing(base + change, dtype)
    magic = unit * (1.5 * 2.0**23)  # x + magic - magic is x rounded to a multiple of the unit, for |x| < 2**22 units
    near = (base + magic) - magic
    rest = (base - near) + change + dither * unit
    return near + ((rest + magic) - magic)


fused_stochastic = kernel(stochastic)
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


def pairs_into(pairs: Tensor, first: Tensor, key: Tensor) -> None:
    """pairs[:, i] = the two numbers of block first + i, for float32 pairs (2, n)."""
    c0 = torch.arange(pairs.shape[1], dtype=torch.int32, device=key.device) + first
    a, b = _pairs(*threefry(c0, key[2], key[0], key[1]))
    pairs[0].copy_(a)
    pairs[1].copy_(b)


def spread(pairs: Tensor, lane: Tensor) -> Tensor:
    """(n, 2, 32): the dither of n blocks from their pairs, for `lane` (2, 32), which are `lanes`."""
    return _lane(pairs[0][:, None, None], pairs[1][:, None, None], lane)


def _shrunk(wide: Tensor, total: Tensor, shrink: Tensor, keep: Tensor | None) -> Tensor:
    change = wide * shrink + total
    own = inside(keep, wide)
    return change if own is None else torch.where(own, change, 0.0)


@kernel
def _settle_blocks(
    out: Tensor,
    base: Tensor,
    total: Tensor,
    pairs: Tensor,
    lane: Tensor,
    first: Tensor,
    key: Tensor,
    shrink: Tensor,
    keep: Tensor | None,
) -> None:
    pairs_into(pairs, first, key)
    wide = base.float()
    out.copy_(stochastic(wide, _shrunk(wide, total, shrink, keep), spread(pairs, lane), out.dtype))


@kernel
def _settle_blocks_(
    weights: Tensor, total: Tensor, pairs: Tensor, lane: Tensor, first: Tensor, key: Tensor, shrink: Tensor, keep: Tensor | None
) -> None:
    pairs_into(pairs, first, key)
    wide = weights.float()
    weights.copy_(stochastic(wide, _shrunk(wide, total, shrink, keep), spread(pairs, lane), weights.dtype))


def settle(
    out: Tensor, base: Tensor, total: Tensor, key: Tensor, start: int, shrink: Tensor, first: Tensor, keep: Tensor | None = None
) -> None:
    """out <- decay * base + total, rounded stochastically, in one compiled pass: `shrink` is decay - 1, `first` is start / 64.

    One-dimensional contiguous tensors; `start`, the index of the first element in its stream, is a multiple of 64. Outside `keep`
    (`inside`), out <- base.
    """
    whole = base.numel() // BLOCK * BLOCK
    if whole:
        pairs = torch.empty(2, whole // BLOCK, device=base.device)
        target, given, lane = out[:whole].view(-1, 2, 32), total[:whole].view(-1, 2, 32), lanes(base.device).view(2, 32)
        kept = part_of(keep, slice(whole))
        kept = kept if kept is None or kept is keep else kept.view(-1, 2, 32)
        if out is base:
            _settle_blocks_(target, given, pairs, lane, first, key, shrink, kept)
        else:
            _settle_blocks(target, base[:whole].view(-1, 2, 32), given, pairs, lane, first, key, shrink, kept)
    if whole < base.numel():
        drawn = dither(key[None], [Stretch(0, start + whole, base.numel() - whole)])
        wide = base[whole:].float()
        change = _shrunk(wide, total[whole:], shrink, part_of(keep, slice(whole, None)))
        out[whole:] = stochastic(wide, change, drawn, base.dtype)
