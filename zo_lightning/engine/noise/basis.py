"""Basis: directions along single weights, which their seeds name."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.shaped import Place, Shaped, Where

_ELEMENT = 31
"""Bits of a seed for the number of an element; above them are as many bits of its parameter's key as leave it below 2**63."""
_KEY = (1 << 32) - 1
LARGEST = 1 << _ELEMENT
"""Elements of a parameter that can be told apart."""


class Coordinate(NamedTuple):
    """Which weight a seed names: the low 32 bits of its parameter's key, and its number in logical order."""

    key: int
    element: int


def low_bits(key: int) -> int:
    """What seeds have of a parameter's key."""
    return key & _KEY


def seed_of(key: int, element: int) -> int:
    """The seed of e_i for one element of a parameter."""
    return low_bits(key) << _ELEMENT | element


def coordinate_of(seed: int) -> Coordinate:
    """The weight that a seed names."""
    return Coordinate(seed >> _ELEMENT, seed & (LARGEST - 1))


class Basis(Shaped):
    """z(seed) = e_i: 1 at the weight that the seed names, 0 at all others. It has no randomness; `Coordinatewise` brings it along.

    A sum of terms is as long as the terms that a parameter has, and an update without weight decay touches their elements alone.
    """

    name = "basis"
    exact = True

    def values(self, seed: int, place: Place, where: Where) -> Tensor:
        return self.total((seed,), (1.0,), place, where, torch.float32)

    def total(self, seeds: Sequence[int], coefficients: Sequence[float], place: Place, where: Where, dtype: torch.dtype) -> Tensor:
        index, sums = _sums(seeds, coefficients, place.key, dtype)
        index, sums = index.to(place.device), sums.to(place.device)
        if isinstance(where, range):
            here = (index >= where.start) & (index < where.stop)
            found = torch.zeros(len(where), dtype=dtype, device=place.device)
            found[index[here] - where.start] = sums[here]
            return found
        if not len(index):
            return torch.zeros(where.shape, dtype=dtype, device=place.device)
        at = torch.searchsorted(index, where).clamp_max(len(index) - 1)
        return torch.where(index[at] == where, sums[at], 0.0)

    def touched(self, seeds: Sequence[int], key: int) -> Tensor:
        own = _by_key(tuple(seeds)).get(low_bits(key))
        return torch.zeros(0, dtype=torch.int64) if own is None else own.elements.unique()


class _Own(NamedTuple):
    """The terms of one parameter, in their order, and their elements."""

    terms: tuple[int, ...]
    elements: Tensor


@functools.lru_cache(maxsize=4)
def _by_key(seeds: tuple[int, ...]) -> dict[int, _Own]:
    """By the low bits of keys; all tensors of a sweep ask for the same."""
    terms: dict[int, list[int]] = {}
    elements: dict[int, list[int]] = {}
    for j, seed in enumerate(seeds):
        key, element = coordinate_of(seed)
        terms.setdefault(key, []).append(j)
        elements.setdefault(key, []).append(element)
    return {key: _Own(tuple(own), torch.tensor(elements[key])) for key, own in terms.items()}


def _sums(seeds: Sequence[int], coefficients: Sequence[float], key: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(elements of a parameter in ascending order, the sum of the coefficients of each, added in their order)."""
    own = _by_key(tuple(seeds)).get(low_bits(key))
    if own is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype)
    c = torch.tensor([coefficients[j] for j in own.terms], dtype=dtype)
    index, place, counts = own.elements.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(index), dtype=dtype)
    order = place.argsort(stable=True)
    begins = counts.cumsum(0) - counts
    for turn in range(int(counts.max())):  # momentum has an element once for each of its steps
        more = counts > turn
        sums[more] += c[order[(begins + turn)[more]]]
    return index, sums
