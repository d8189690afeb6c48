"""Stochastic rounding of 16-bit weights: theta moves to one of its two neighbours, to each as often as makes the mean exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Stretch
from zo_lightning.engine.noise.compiling import kernel
from zo_lightning.engine.noise.dither import BLOCK, Dithers, dither
from zo_lightning.engine.noise.inside import Inside, chosen

if TYPE_CHECKING:
    from zo_lightning.engine.noise.members import Members

_BITS = {torch.bfloat16: (8, 2.0**-119), torch.float16: (11, 2.0**-14)}
"""Bits of the significand, and the binade below which the spacing stays the same: for float16 that of its subnormals."""


def rounds(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are rounded stochastically."""
    return dtype in _BITS


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


def _settled(base: Tensor, total: Tensor, dithers: Dithers, shrink: Tensor, inside: Inside | None) -> Tensor:
    wide = base.float()
    return stochastic(wide, chosen(inside, wide, wide * shrink + total, 0.0), dithers.values(), base.dtype)


@kernel
def _settle_blocks(out: Tensor, base: Tensor, total: Tensor, dithers: Dithers, shrink: Tensor, inside: Inside | None) -> None:
    out.copy_(_settled(base, total, dithers, shrink, inside))


@kernel
def _settle_blocks_(weights: Tensor, total: Tensor, dithers: Dithers, shrink: Tensor, inside: Inside | None) -> None:
    weights.copy_(_settled(weights, total, dithers, shrink, inside))


def settle(out: Tensor, base: Tensor, total: Tensor, key: Tensor, start: int, shrink: Tensor, mask: Members | None = None) -> None:
    """out <- decay * base + total, rounded stochastically, in one compiled pass; `shrink` is decay - 1.

    One-dimensional contiguous tensors; `start`, the index of the first element in its stream, is a multiple of 64. Outside the mask,
    out <- base.
    """
    whole = base.numel() // BLOCK * BLOCK
    if whole:
        dithers = Dithers.of(whole // BLOCK, start, key)
        target, given = out[:whole].view(-1, 2, 32), total[:whole].view(-1, 2, 32)
        inside = None if mask is None else mask.inside(base[:whole], start)
        if out is base:
            _settle_blocks_(target, given, dithers, shrink, inside)
        else:
            _settle_blocks(target, base[:whole].view(-1, 2, 32), given, dithers, shrink, inside)
    if whole < base.numel():
        drawn = dither(key[None], [Stretch(0, start + whole, base.numel() - whole)])
        wide = base[whole:].float()
        change = wide * shrink + total[whole:]
        if mask is not None:
            change = torch.where(mask.keep(base[whole:], start + whole), change, 0.0)
        out[whole:] = stochastic(wide, change, drawn, base.dtype)
