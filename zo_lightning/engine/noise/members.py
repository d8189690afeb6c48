"""Which elements of a tensor are trained: by their size, by chance, by a stored bit each, or as a list."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Stretch, compute_dtype, constants
from zo_lightning.engine.noise.dither import BLOCK, Dithers, dither, dither_at, lanes
from zo_lightning.engine.noise.inside import Bounds, Inside, Lots, Plain, Ties, Words, bits_of
from zo_lightning.engine.noise.region import Region
from zo_lightning.engine.seeds import stream


class Members(ABC):
    """A mask m of one tensor, m[i] in {0, 1}, for its elements in logical order; asked for piece by piece, never stored as a whole."""

    @abstractmethod
    def keep(self, base: Tensor, start: int) -> Tensor:
        """bool of the shape of `base`, which holds elements start, start + 1, ... of the unperturbed tensor."""

    def inside(self, base: Tensor, start: int) -> Inside:
        """The same for a kernel: `base` is flat and `start` a multiple of 64, as is its length."""
        return Plain(self.keep(base, start).view(-1, 2, 32))

    @abstractmethod
    def at(self, index: Tensor, base: Tensor) -> Tensor:
        """m[index], for an int64 tensor of any shape; `base` has the unperturbed values at `index`."""

    def to(self, device: torch.device) -> Members:
        """The same mask for a tensor on `device`."""
        return self

    @classmethod
    def together(cls, members: Sequence[Members], values: Sequence[Tensor]) -> Tensor:
        """The masks of several small one-dimensional tensors, all of this class, concatenated."""
        return torch.cat([one.keep(base, 0) for one, base in zip(members, values, strict=True)])


@dataclass(frozen=True)
class Band(Members):
    """|theta[i]| < bound, or > bound where `largest`; of those with |theta[i]| = bound the elements up to number `last`.

    Membership follows the weights: nothing is stored. Weights are looked at in `dtype`, that of the model.
    """

    bound: float
    last: int
    dtype: torch.dtype
    largest: bool = False

    def keep(self, base: Tensor, start: int) -> Tensor:
        size = base.reshape(-1).to(self.dtype).abs()
        keep = torch.empty(size.shape, dtype=torch.bool, device=size.device)
        ties = min(max(self.last + 1 - start, 0), len(size))  # torch's own comparisons: compiled ones that store bools are not vectorized
        with_ties, without = (torch.ge, torch.gt) if self.largest else (torch.le, torch.lt)
        with_ties(size[:ties], self.bound, out=keep[:ties])
        without(size[ties:], self.bound, out=keep[ties:])
        return keep.view(base.shape)

    def inside(self, base: Tensor, start: int) -> Inside:
        if base.dtype != self.dtype:
            return super().inside(base, start)
        wide = compute_dtype(self.dtype)
        count, device = base.numel(), base.device
        ties = min(max(self.last + 1 - start, 0), count)
        low, high = (self.bound, math.inf) if self.largest else (-1.0, self.bound)
        if 0 < ties < count:
            limit = (self.last - start - BLOCK * torch.arange(count // BLOCK, device=device)).clamp(-1, BLOCK).float()
            return Ties(constants((low, high, self.bound), wide, device), limit, lanes(device).view(2, 32))
        if not ties:
            edge = torch.nextafter(torch.tensor(self.bound, dtype=wide), torch.tensor(math.inf if self.largest else -1.0, dtype=wide))
            low, high = (edge.item(), high) if self.largest else (low, edge.item())
        return Bounds(constants((low, high), wide, device))

    def at(self, index: Tensor, base: Tensor) -> Tensor:
        bound = self._bounds(base.device)
        size = base.to(self.dtype).to(bound.dtype).abs() * bound[1]
        return (size < bound[0]) | ((size == bound[0]) & (index <= self.last))

    def _bounds(self, device: torch.device) -> Tensor:
        sign = -1.0 if self.largest else 1.0
        return constants((self.bound * sign, sign), compute_dtype(self.dtype), device)

    @classmethod
    def together(cls, members: Sequence[Members], values: Sequence[Tensor]) -> Tensor:
        bands = [one for one in members if isinstance(one, Band)]
        flat = torch.cat(list(values))
        if any(band.dtype != bands[0].dtype for band in bands):
            return super().together(members, values)
        wide = compute_dtype(bands[0].dtype)
        signs = [-1.0 if band.largest else 1.0 for band in bands]
        table = torch.tensor([[b.bound * s for b, s in zip(bands, signs, strict=True)], signs], dtype=wide).to(flat.device)
        place, owner = _places(tuple(len(value) for value in values), flat.device)
        last = torch.tensor([band.last for band in bands], device=flat.device)[owner]
        bound, sign = table[:, owner]
        size = flat.to(bands[0].dtype).to(wide).abs() * sign
        keep: Tensor = (size < bound) | ((size == bound) & (place <= last))
        return keep


@functools.lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For tensors of these lengths, concatenated: the number of each element in its tensor, and the number of its tensor."""
    owner = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    return torch.cat([torch.arange(length, device=device) for length in lengths]), owner


@dataclass(frozen=True)
class Lot(Members):
    """u[i] <= cut, with u[i] in [-1/2, 1/2] a function of (seed, parameter key, i), uniform and pairwise independent (dither.dither)."""

    seed: int
    key: int
    cut: float

    def keep(self, base: Tensor, start: int) -> Tensor:
        return (self.lots(start, base.numel(), base.device) <= self.cut).view(base.shape)

    def inside(self, base: Tensor, start: int) -> Inside:
        dithers = Dithers.of(base.numel() // BLOCK, start, self._key(base.device))
        return Lots(dithers, constants(self.cut, torch.float32, base.device))

    def at(self, index: Tensor, base: Tensor) -> Tensor:
        return dither_at(index, self._key(index.device)) <= self.cut

    def lots(self, start: int, length: int, device: torch.device) -> Tensor:
        """u of some elements."""
        return dither(self._key(device)[None], [Stretch(0, start, length)])

    def _key(self, device: torch.device) -> Tensor:
        return _lot_key(self.seed, self.key, device)


@functools.lru_cache(maxsize=1024)
def _lot_key(seed: int, key: int, device: torch.device) -> Tensor:
    return torch.tensor(stream(seed, key, b"zo.mask"), dtype=torch.int32).to(device)


@dataclass(frozen=True, eq=False)
class Bits(Members):
    """A stored bit for every element: bit i % 32 of word i // 32 of the int32 tensor `words`, whose length is even."""

    words: Tensor

    def to(self, device: torch.device) -> Bits:
        return self if self.words.device == device else Bits(self.words.to(device))

    @staticmethod
    def of(keep: Tensor) -> Bits:
        """From a bool tensor."""
        flat = keep.reshape(-1)
        whole = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, 8)
        weights = 1 << torch.arange(8, dtype=torch.uint8, device=keep.device)  # bytes of a word from the lowest up
        return Bits((whole * weights).sum(1, dtype=torch.uint8).view(torch.int32))

    @staticmethod
    def length(numel: int) -> int:
        """Words for so many elements."""
        return -(-numel // BLOCK) * 2

    @property
    def count(self) -> int:
        """How many elements are trained."""
        return sum(int(bits_of(some.view(-1, 2)).sum()) for some in self.words.split(1 << 16))

    @staticmethod
    def taken(mask: Members, theta: Tensor, region: Region | None = None) -> Bits:
        """What a mask is at these weights; where they are a region of a tensor, nothing outside of it."""
        flat, step = theta.reshape(-1), 1 << 21
        if region is not None:
            index, keep = region.index(theta.device), torch.zeros(region.numel, dtype=torch.bool, device=theta.device)
            keep[index] = mask.at(index, flat)
            return Bits.of(keep)
        pieces = [Bits.of(mask.keep(flat[at : at + step], at)).words for at in range(0, flat.numel(), step)]
        return Bits(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32, device=theta.device))

    def keep(self, base: Tensor, start: int) -> Tensor:
        words = self.words[start // BLOCK * 2 : Bits.length(start + base.numel())]
        return bits_of(words.view(-1, 2)).view(-1)[start % BLOCK :][: base.numel()].view(base.shape)

    def inside(self, base: Tensor, start: int) -> Inside:
        return Words(self.words[start // 32 : (start + base.numel()) // 32].view(-1, 2))

    def at(self, index: Tensor, base: Tensor) -> Tensor:
        return ((self.words[index >> 5] >> (index & 31).int()) & 1) != 0


@dataclass(frozen=True, eq=False)
class Listed(Members):
    """The elements of a sorted int64 or int32 tensor `index`: what costs time is only what is trained."""

    index: Tensor

    def to(self, device: torch.device) -> Listed:
        return self if self.index.device == device else Listed(self.index.to(device))

    def keep(self, base: Tensor, start: int) -> Tensor:
        keep = torch.zeros(base.numel(), dtype=torch.bool, device=base.device)
        here = self.index[(self.index >= start) & (self.index < start + base.numel())]
        keep[(here - start).long()] = True
        return keep.view(base.shape)

    def at(self, index: Tensor, base: Tensor) -> Tensor:
        if not len(self.index):
            return torch.zeros_like(index, dtype=torch.bool)
        place = torch.searchsorted(self.index, index.to(self.index.dtype)).clamp_max(len(self.index) - 1)
        return self.index[place] == index
