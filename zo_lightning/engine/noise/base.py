"""What a noise is: values on demand for any stretch of any stream, and a kernel that adds them in one pass."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.region import Region
from zo_lightning.engine.seeds import query_seed

if TYPE_CHECKING:
    from zo_lightning.engine.noise.members import Members


def compute_dtype(weights: torch.dtype) -> torch.dtype:
    """What weights of a dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if weights == torch.float64 else torch.float32


class Stretch(NamedTuple):
    """Elements `first` to `first + length` of the stream in row `row` of a table of keys."""

    row: int
    first: int
    length: int


class Drawn(NamedTuple):
    """Where the keys of one tensor stand in a table of keys: `terms` rows for its noise, then one for its rounding if `rounded`.

    `region` tells which elements of the streams are the tensor's, where it is a part of a parameter.
    """

    table: Tensor
    row: int
    terms: int
    rounded: bool
    region: Region | None = None

    def key(self, term: int) -> Tensor:
        """The key, of shape (3,), of the noise of a term."""
        return self.table[self.row + term]

    @property
    def keys(self) -> Tensor:
        """Those of all terms, of shape (terms, 3)."""
        return self.table[self.row : self.row + self.terms]

    @property
    def rounding(self) -> Tensor:
        """The key of the stochastic rounding, where there is one."""
        return self.table[self.row + self.terms]

    def stretch(self, term: int, first: int, length: int) -> Stretch:
        """A stretch of a term's noise; of the rounding for `term` = `terms`."""
        return Stretch(self.row + term, first, length)

    def whole(self, term: int, length: int) -> list[Stretch]:
        """The stretches of all elements of the tensor, of which there are `length`."""
        runs = [(0, length)] if self.region is None else self.region.stretches()
        return [Stretch(self.row + term, first, count) for first, count in runs]


class Noise(ABC):
    """z[i] = noise(seed, parameter key, shape of the parameter, i), with E z = 0 and E z^2 = 1: `Elementwise`, `Scaled` or `Shaped`."""

    name: str
    exact = False
    """Whether its values have the same bits on every machine; others have up to their last ones."""

    @property
    def text(self) -> str:
        """The name, with the options where there are any: what checkpoints and step logs keep, and `as_noise` reads."""
        options: list[str] = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)] if is_dataclass(self) else []
        return f"{self.name}({', '.join(options)})" if options else self.name

    def seed(self, run_seed: int, step: int, query: int) -> int:
        """The seed of a query of a step, below 2**63; all that the noise knows of them."""
        return query_seed(run_seed, step, query)


class Elementwise(Noise):
    """Noise whose values know nothing of each other, nor of the shape of the parameter; it has kernels.

    `keys` is an int32 tensor of shape (streams, 3), one `seeds.stream` a row, on the device of the weights. Values are computed in
    float32; they are cast last, to the dtype that is asked for.
    """

    fuses = 1
    """Terms that a compiled pass over weights in place takes at once."""
    grain = 1 << 19
    """A compiled pass over a part of a stream has the bits of one over all of it where the part begins and ends at multiples of this."""

    @abstractmethod
    def values(self, keys: Tensor, stretches: Sequence[Stretch], dtype: torch.dtype, fused: bool = False) -> Tensor:
        """z over the stretches, concatenated; one-dimensional, of `dtype` (float32 or float64), on the device of `keys`.

        `fused` computes the hash in one compiled kernel: the same values, worth its compilation where others are compiled anyway.
        """

    def joins(self, lengths: Sequence[int]) -> bool:
        """Whether `together` is there for streams of these lengths, each from its beginning."""
        return False

    def together(self, base: Tensor, keys: Tensor, stretches: Sequence[Stretch], steps: Sequence[Sequence[tuple[float, float]]]) -> Tensor:
        """decay * base + c * z over the stretches in one compiled pass; wide.

        Each of `steps` has a (decay, c) of each stretch, and a row of the result, of shape (steps, elements). `base`, one-dimensional, has
        the lengths of the stretches together; bit for bit the arithmetic of `values`.
        """
        raise NotImplementedError

    @abstractmethod
    def at(self, index: Tensor, key: Tensor) -> Tensor:
        """z[index] in float32, for an int64 tensor of any shape and one stream's `key` of shape (3,)."""

    @abstractmethod
    def add(self, out: Tensor, base: Tensor, key: Tensor, start: int, scalars: Tensor, mask: Members | None = None) -> None:
        """out <- decay * base + c * z[start : start + numel] in one compiled pass, with `scalars` = (decay, c).

        `out` and `base` are one-dimensional and contiguous, and may be the same tensor; `start` is a multiple of 2**19; `key` has shape
        (3,). The arithmetic is that of `scalars`' dtype: float64 for float64 weights, else float32. Outside the mask, out <- base.
        """

    @abstractmethod
    def add_rounded(
        self, out: Tensor, base: Tensor, key: Tensor, round_key: Tensor, start: int, scalars: Tensor, mask: Members | None = None
    ) -> None:
        """The same for 16-bit weights with stochastic rounding (rounding.py), with `scalars` = (decay - 1, c) in float32."""

    def add_terms(self, weights: Tensor, keys: Tensor, start: int, scalars: Tensor) -> None:
        """weights <- decay * weights + (c_1 z_1 + ... + c_n z_n), summed in their order, for 1 < n <= `fuses`; otherwise as `add`.

        `keys` has shape (n, 3), `scalars` = (decay, c_1, ..., c_n).
        """
        raise NotImplementedError

    def accumulate(self, total: Tensor, keys: Tensor, start: int, coefficients: Sequence[float]) -> None:
        """total <- ((total + c_1 z_1) + c_2 z_2) + ... for any number of terms; otherwise as `add`."""
        for key, c in zip(keys, coefficients, strict=True):
            self.add(total, total, key, start, coefficients_of((1.0, c), total.dtype, total.device))


@functools.lru_cache(maxsize=256)
def constants(values: float | tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that nobody writes to, of values that all steps ask for: positions and bounds."""
    return torch.tensor(values, dtype=dtype).to(device)


@functools.lru_cache(maxsize=8)
def coefficients_of(values: float | tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for what changes from step to step, of which few are kept: each is made between large temporaries, and as long as it lives
    malloc can give the memory below it to nobody (0.5 GB became 2.5 in 300 steps of a model of 4 MB with 256 of them).
    """
    return torch.tensor(values, dtype=dtype).to(device)


def counters(keys: Tensor, stretches: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c0, c1, k0, k1) for consecutive counters of several streams: `stretches` holds (row, first counter, how many)."""
    device = keys.device
    if len(stretches) == 1:
        row, first, count = stretches[0]
        k = keys[row]
        return _arange(first, count, device), k[2], k[0], k[1]
    c0, owner = layout(stretches, device)
    table = keys[torch.tensor([row for row, _, _ in stretches], device=device)][owner]
    return c0, table[:, 2], table[:, 0], table[:, 1]


def layout(stretches: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """All counters of the (row, first counter, how many), and which of them each is of."""
    ranges = tuple((first, count) for _, first, count in stretches)
    small = sum(count for _, count in ranges) <= _KEPT_COUNTERS
    return (_layout if small else _layout.__wrapped__)(ranges, device)


_KEPT_COUNTERS = 1 << 16
"""Larger layouts are made anew: 0.8 MB each, 13 MB for all that are kept."""


@functools.lru_cache(maxsize=16)
def _layout(ranges: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The blocks of a model have the same ranges (first, how many)."""
    lengths = torch.tensor([count for _, count in ranges], device=device)
    c0 = torch.cat([_arange(first, count, device) for first, count in ranges])
    return c0, torch.arange(len(ranges), device=device).repeat_interleave(lengths)


def pieces(values: Tensor, block: int, stretches: Sequence[Stretch]) -> Tensor:
    """Of the values of whole blocks, one stretch after another, those that are in the stretches."""
    if all(first % block == 0 and length % block == 0 for _, first, length in stretches):
        return values
    found, at = [], 0
    for _, first, length in stretches:
        found.append(values[at + first % block : at + first % block + length])
        at += ((first + length - 1) // block - first // block + 1) * block
    return found[0] if len(found) == 1 else torch.cat(found)


def _arange(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.int32, device=device)
