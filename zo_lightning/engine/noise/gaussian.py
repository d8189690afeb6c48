"""Gaussian noise by Box-Muller: one hash gives the pair (z[i], z[i + 2**18]) of a block of 2**19 elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Elementwise, Stretch, constants, counters
from zo_lightning.engine.noise.compiling import available, dispatch, kernel
from zo_lightning.engine.noise.inside import choose_into
from zo_lightning.engine.noise.rounding import settle
from zo_lightning.engine.noise.threefry import fused_threefry, threefry

if TYPE_CHECKING:
    from zo_lightning.engine.noise.members import Members

HALF = 1 << 18
"""The two values of a hash lie this far apart: the halves of a block are separate contiguous tensors, so the kernel vectorizes."""
_BLOCK = 1 << 15
"""Elements of a block that is drawn eagerly, by one thread."""
_QUARTERS = math.pi * 2.0**-31


def _polar(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Radius sqrt(-2 ln u) with u = 2**-24, 2 * 2**-24, ..., 1, exact in float32, and the angle in [-pi, pi)."""
    u = (((x0 >> 8) & 0xFFFFFF) + 1).float() * 2.0**-24
    return torch.sqrt(-2.0 * torch.log(u)), x1.float() * _QUARTERS


def _pairs(count: int, first: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    c0 = torch.arange(count, dtype=torch.int32, device=key.device) + first
    return _polar(*threefry(c0, key[2], key[0], key[1]))


def _moved(base: Tensor, z: Tensor, scalars: Tensor) -> Tensor:
    return base.to(scalars.dtype) * scalars[0] + scalars[1] * z.to(scalars.dtype)


@kernel
def _add_pair(a: Tensor, b: Tensor, base_a: Tensor, base_b: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    radius, angle = _pairs(a.shape[0], first, key)
    a.copy_(_moved(base_a, radius * torch.cos(angle), scalars))
    b.copy_(_moved(base_b, radius * torch.sin(angle), scalars))


@kernel
def _add_pair_(a: Tensor, b: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    radius, angle = _pairs(a.shape[0], first, key)
    a.copy_(_moved(a, radius * torch.cos(angle), scalars))
    b.copy_(_moved(b, radius * torch.sin(angle), scalars))


@kernel
def _add_first(a: Tensor, base: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    radius, angle = _pairs(a.shape[0], first, key)
    a.copy_(_moved(base, radius * torch.cos(angle), scalars))


@kernel
def _add_first_(a: Tensor, first: Tensor, key: Tensor, scalars: Tensor) -> None:
    radius, angle = _pairs(a.shape[0], first, key)
    a.copy_(_moved(a, radius * torch.cos(angle), scalars))


@kernel
def _normal_at(index: Tensor, key: Tensor) -> Tensor:
    pair = (index >> 19 << 18) + (index & (HALF - 1))
    radius, angle = _polar(*threefry(pair.int(), key[2], key[0], key[1]))
    return radius * torch.where((index & HALF) != 0, torch.sin(angle), torch.cos(angle))


def exact_normal(index: Tensor, key: Tensor) -> Tensor:
    """z[index] in float64, where a vectorized and a plain logarithm differ by less than float32 shows: for any part the same."""
    pair = (index >> 19 << 18) + (index & (HALF - 1))
    x0, x1 = threefry(pair.int(), key[2], key[0], key[1])
    radius = torch.sqrt(-2.0 * torch.log((((x0 >> 8) & 0xFFFFFF) + 1).double() * 2.0**-24))
    angle = x1.double() * _QUARTERS
    return radius * torch.where((index & HALF) != 0, torch.sin(angle), torch.cos(angle))


def normal(key: Tensor, where: range, numel: int, fused: bool = False) -> Tensor:
    """z[where] in float32, of a stream of `numel` elements: the same bits however it is cut, for blocks are drawn as wholes.

    Vector functions differ in their last bits between the bodies and the ends of loops. `fused` draws long streams by the compiled kernel,
    whose bits are its own.
    """
    fused = fused and numel > HALF and available(key.device.type)
    block = 2 * HALF if fused else _BLOCK
    first, found = where.start // block * block, []
    for begin in range(first, where.stop, block):
        size = min(block, numel - begin)
        if fused:
            z = torch.zeros(size, device=key.device)
            Gaussian().add(z, z, key, begin, constants((1.0, 1.0), torch.float32, key.device))
        else:
            z = Gaussian().values(key[None], [Stretch(0, begin, size)], torch.float32)
        found.append(z)
    whole = found[0] if len(found) == 1 else torch.cat(found) if found else torch.zeros(0, device=key.device)
    return whole[where.start - first : where.stop - first]


def pairs(keys: Tensor, sizes: Sequence[int], fused: bool = False) -> list[Tensor]:
    """Standard normal values of several streams, `sizes` of each, in float32: hash i gives those at i and at ceil(size / 2) + i.

    Other values than those of `Gaussian`, for half the hashes: for what is always drawn as a whole. `keys` has shape (streams, 3).
    """
    half = [-(-size // 2) for size in sizes]
    hashes = (fused_threefry if fused else threefry)(*counters(keys, [(row, 0, count) for row, count in enumerate(half)]))
    radius, angle = _polar(*hashes)
    sides = zip((radius * torch.cos(angle)).split(half), (radius * torch.sin(angle)).split(half), strict=True)
    return [torch.cat(both)[:size] for both, size in zip(sides, sizes, strict=True)]


def _alias(x: Tensor) -> Tensor:
    """The same memory as a storage of its own: torch.compile copies whole tensors when two mutated inputs share one storage."""
    return torch.from_dlpack(x)


class Gaussian(Elementwise):
    """Independent standard normal values, as MeZO draws them (arXiv 2305.17333); |z| < 5.8 by the 24 bits of the radius.

    Compiled and eager kernels take logarithms, sines and cosines from different libraries. On CPU (AVX-512), over all 2**24 radii and all
    angles, they differ by 4.8e-7 (radius) and 1.2e-7 (sine, cosine), so that |z - z'| < 1.7e-6; both are within 2e-6 of float64.
    """

    name = "gaussian"

    def values(self, keys: Tensor, stretches: Sequence[Stretch], dtype: torch.dtype, fused: bool = False) -> Tensor:
        pieces = []
        for group in self._within_halves(stretches):
            second = (group[0].first // HALF) % 2
            ranges = [(s.row, s.first // (2 * HALF) * HALF + s.first % HALF, s.length) for s in group]
            radius, angle = _polar(*(fused_threefry if fused else threefry)(*counters(keys, ranges)))
            pieces.append(radius * (torch.sin(angle) if second else torch.cos(angle)))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(dtype)

    @staticmethod
    def _within_halves(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
        """The stretches cut at the borders of halves, consecutive ones of the same side together."""
        groups: list[list[Stretch]] = []
        for row, start, count in stretches:
            end = start + count
            while start < end:
                stop = min(end, (start // HALF + 1) * HALF)
                piece = Stretch(row, start, stop - start)
                if groups and (groups[-1][0].first // HALF) % 2 == (start // HALF) % 2:
                    groups[-1].append(piece)
                else:
                    groups.append([piece])
                start = stop
        return groups

    def at(self, index: Tensor, key: Tensor) -> Tensor:
        z: Tensor = dispatch(_normal_at, index.device)(index, key)
        return z

    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor, mask: Members | None = None) -> None:
        for begin in range(0, base.numel(), 2 * HALF):
            part = slice(begin, begin + 2 * HALF)
            target, given = out[part], base[part]
            if mask is None:
                _add_block(target, target if out is base else given, key, start + begin, scalars)
            else:
                moved = torch.empty_like(given, dtype=scalars.dtype)
                _add_block(moved, given, key, start + begin, scalars)
                choose_into(target, given, moved, mask, start + begin)

    def add_rounded(
        self, out: Tensor, base: Tensor, key: Tensor, round_key: Tensor, start: int, scalars: Tensor, mask: Members | None = None
    ) -> None:
        for begin in range(0, base.numel(), 2 * HALF):
            part = slice(begin, begin + 2 * HALF)
            total = torch.zeros_like(base[part], dtype=torch.float32)
            self.add(total, total, key, start + begin, torch.stack((torch.ones_like(scalars[1]), scalars[1])))
            given = out[part]
            settle(given, given if out is base else base[part], total, round_key, start + begin, scalars[0], mask)


def _add_block(out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor) -> None:
    """Of one block of 2**19 elements, or of the last one, which may be shorter: out <- decay * base + c z."""
    first = constants(start // 2, torch.int32, key.device)
    pairs = max(0, base.numel() - HALF)
    rest = slice(pairs, min(base.numel(), HALF))
    a, b = slice(0, pairs), slice(HALF, HALF + pairs)
    if pairs and out is base:
        _add_pair_(_alias(out[a]), _alias(out[b]), first, key, scalars)
    elif pairs:
        _add_pair(_alias(out[a]), _alias(out[b]), base[a], base[b], first, key, scalars)
    if rest.stop > pairs and out is base:
        _add_first_(out[rest], first + pairs, key, scalars)
    elif rest.stop > pairs:
        _add_first(out[rest], base[rest], first + pairs, key, scalars)
