"""Regions: which elements of a parameter are at hand where it is sharded, by their numbers in the whole parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Strip(NamedTuple):
    """`rows` runs of `width` consecutive elements; the first begins at element `first`, each next one `stride` later."""

    first: int
    rows: int
    stride: int
    width: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.rows * self.width

    def before(self, element: int) -> int:
        """How many of its elements have a smaller number in the whole parameter."""
        row, column = divmod(max(0, element - self.first), self.stride)
        return min(row * self.width + min(column, self.width), self.numel)

    def element(self, place: int) -> int:
        """The number in the whole parameter of its element number `place`."""
        row, column = divmod(place, self.width)
        return self.first + row * self.stride + column

    def pick(self, begin: int, end: int, values: Tensor, start: int) -> Tensor:
        """Its elements begin to end, from flat `values` of elements start, start + 1, ... of the whole parameter."""
        pieces = []
        while begin < end:
            column, at = begin % self.width, self.element(begin) - start
            if column or end - begin < self.width:
                length = min(self.width - column, end - begin)
                pieces.append(values[at : at + length])
            else:
                length = (end - begin) // self.width * self.width
                rows = values.as_strided((length // self.width, self.width), (self.stride, 1), values.storage_offset() + at)
                pieces.append(rows.reshape(-1))
            begin += length
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Part(NamedTuple):
    """Elements `begin` to `end` of a region, which lie among `first` to `last` of the whole parameter.

    `pick(values, start)` takes them from flat values of elements start, start + 1, ... of the whole parameter.
    """

    begin: int
    end: int
    first: int
    last: int
    pick: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Region:
    """Elements of a parameter of `shape`: those of the strips, one after another, in the logical order of the local tensor."""

    shape: tuple[int, ...]
    strips: tuple[Strip, ...]

    @staticmethod
    def of(shape: Sequence[int], kept: Sequence[Sequence[int]]) -> Region:
        """From the indices that are kept in each dimension, ascending."""
        sizes = tuple(shape)
        last = max((d for d, own in enumerate(kept) if len(own) < sizes[d]), default=-1)  # behind it everything is kept
        inner = math.prod(sizes[last + 1 :])
        firsts, width = [0], math.prod(sizes)
        if any(not len(own) for own in kept):
            return Region(sizes, ())
        strips = []
        if last >= 0:
            firsts = [0]
            for d in range(last):
                firsts = [first * sizes[d] + index for first in firsts for index in kept[d]]
            for begin, length in _runs(kept[last]):
                width = length * inner
                for start, count, step in _series(firsts):
                    row = sizes[last] * inner
                    strips.append((start * row + begin * inner, count, max(step * row, width), width))
        else:
            strips.append((0, 1, width, width))
        return _ordered(sizes, [Strip(*strip) for strip in strips])

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def start(self) -> int | None:
        """The number of its first element where all others follow it; None where they don't, or there is none."""
        return self.strips[0].first if len(self.strips) == 1 and self.strips[0].rows == 1 else None

    def stretches(self) -> list[tuple[int, int]]:
        """(first, how many) of each run of consecutive elements."""
        return [(strip.first + row * strip.stride, strip.width) for strip in self.strips for row in range(strip.rows)]

    def index(self, device: torch.device) -> Tensor:
        """The number of each element in the whole parameter, int64, one-dimensional."""
        numel = sum(strip.numel for strip in self.strips)
        return _index(self, numel, device) if numel <= _KEPT else self.index_of(0, numel, device)

    def index_of(self, begin: int, end: int, device: torch.device) -> Tensor:
        """The same for its elements `begin` to `end`."""
        offset, found = 0, [torch.empty(0, dtype=torch.int64, device=device)]
        for strip in self.strips:
            first, last = max(begin - offset, 0), min(end - offset, strip.numel)
            if first < last:
                place = torch.arange(first, last, device=device)
                row = torch.div(place, strip.width, rounding_mode="floor")
                found.append(strip.first + row * strip.stride + (place - row * strip.width))
            offset += strip.numel
        return torch.cat(found)

    def parts(self, block: int, begin: int = 0, end: int | None = None) -> Iterator[Part]:
        """Its elements `begin` to `end`, cut where a multiple of `block` of the whole parameter lies between them."""
        offset = 0
        for strip in self.strips:
            place = max(begin - offset, 0)
            stop = strip.numel if end is None else min(strip.numel, end - offset)
            while place < stop:
                border = (strip.element(place) // block + 1) * block
                until = min(strip.before(border), stop)
                pick = functools.partial(strip.pick, place, until)
                yield Part(offset + place, offset + until, strip.element(place), strip.element(until - 1) + 1, pick)
                place = until
            offset += strip.numel

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of element numbers of the whole parameter: which of them (positions in `index`) are in the region, and where."""
        found, places = [], []
        offset = 0
        for strip in self.strips:
            apart = index.long() - strip.first
            row, column = torch.div(apart, strip.stride, rounding_mode="floor"), apart % strip.stride
            own = torch.nonzero((apart >= 0) & (row < strip.rows) & (column < strip.width)).reshape(-1)
            found.append(own)
            places.append(offset + row[own] * strip.width + column[own])
            offset += strip.numel
        none = torch.empty(0, dtype=torch.int64, device=index.device)
        return torch.cat([none, *found]), torch.cat([none, *places])


_KEPT = 1 << 15


@functools.lru_cache(maxsize=64)
def _index(region: Region, numel: int, device: torch.device) -> Tensor:
    return region.index_of(0, numel, device)


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """(first, how many) of stretches of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and sum(found[-1]) == index:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found


def _series(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, how many, step) of stretches with equal steps."""
    found: list[tuple[int, int, int]] = []
    for number in numbers:
        if found:
            first, count, step = found[-1]
            if count == 1 or number == first + count * step:
                found[-1] = (first, count + 1, number - first if count == 1 else step)
                continue
        found.append((number, 1, 0))
    return found


def _ordered(shape: tuple[int, ...], strips: list[Strip]) -> Region:
    """In the order of elements; strips of several rows that interleave become single runs, rows that touch one run."""
    joined = [Strip(s.first, 1, s.numel, s.numel) if s.rows == 1 or s.stride == s.width else s for s in strips]
    joined.sort()
    if any(a.element(a.numel - 1) > b.first for a, b in pairwise(joined)):
        single = sorted((s.first + row * s.stride, s.width) for s in joined for row in range(s.rows))
        joined = [Strip(first, 1, width, width) for first, width in single]
    return Region(shape, tuple(joined))
