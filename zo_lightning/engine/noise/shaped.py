"""Noise that knows the shape of a parameter: what it is, and how it is added, one tensor after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Noise, compute_dtype
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.dither import dither, dither_at
from zo_lightning.engine.noise.flat import moved, total_of
from zo_lightning.engine.noise.large import PACK, SMALL, chunks, combine, flat, some_rows
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.noise.places import located, put_moved, take
from zo_lightning.engine.noise.region import Region

if TYPE_CHECKING:
    from zo_lightning.engine.noise.sweep import Item

Where = range | Tensor
"""Elements of a parameter by their number in logical order: consecutive ones, or those of an int64 tensor of any shape."""


class Place(NamedTuple):
    """A parameter: its key, its whole shape, and where its noise is wanted."""

    key: int
    shape: torch.Size
    device: torch.device


class Shaped(Noise):
    """z[i] = noise(seed, parameter key, shape of the parameter, i), in float32."""

    factored = False
    """Whether noise of matrices has `factors`."""

    @abstractmethod
    def values(self, seed: int, place: Place, where: Where) -> Tensor:
        """z of these elements, of the shape of an index or one-dimensional; the same bits however they are asked for."""

    def add(self, out: Tensor, base: Tensor, seed: int, place: Place, decay: float, c: float) -> bool:
        """out <- decay * base + c * z in one compiled pass over a whole large parameter; False where there is none, and nothing was done.

        `out` and `base`, contiguous, may be the same tensor. Bit for bit the arithmetic of `values`.
        """
        return False

    def total(self, seeds: Sequence[int], coefficients: Sequence[float], place: Place, where: Where, dtype: torch.dtype) -> Tensor:
        """sum_j c_j z_j in their order, in `dtype`."""
        wide = torch.zeros((), dtype=dtype, device=place.device)
        return total_of((self.values(seed, place, where) for seed in seeds), coefficients, wide)

    def factors(self, seed: int, place: Place) -> tuple[Tensor, Tensor] | None:
        """(A, B) of shapes (m, r) and (n, r), float32, with Z = A B'; None for what is no matrix, and for noise that is no such product."""
        return None

    def prepare(self, seeds: Sequence[int], places: Sequence[Place]) -> None:
        """Noise of these seeds will be asked for at all these places."""

    def touched(self, seeds: Sequence[int], key: int) -> Tensor | None:
        """The elements of a parameter, ascending, outside of which all these are 0; None where there is no such list."""
        return None


def shaped(item: Item, seeds: Sequence[int], drawn: Drawn, noise: Shaped) -> None:
    """out <- decay * base + sum_j c_j z(seeds[j]) for one tensor; `drawn` has the key of its rounding alone."""
    touched = noise.touched(seeds, item.key) if item.decay == 1.0 and (item.places, item.rows, item.region) == (None, None, None) else None
    if touched is not None:
        touched = touched.to(item.base.device)
        keep = None if item.mask is None else item.mask.at(touched, take(item.base, touched))
        _listed(item, seeds, drawn, noise, touched if keep is None else touched[keep])
    elif item.places is not None or isinstance(item.mask, Listed):
        _listed(item, seeds, drawn, noise, item.mask.index if item.places is None else item.places)  # type: ignore[union-attr]
    elif item.region is not None:
        _region(item, seeds, drawn, noise, item.region)
    elif item.rows is not None and item.numel > PACK:
        some_rows(item, item.rows, drawn, partial(_total, item, seeds, noise))
    elif not _fused(item, seeds, drawn, noise):
        for out, base, start in chunks(item.out, item.base, 0):
            total = _total(item, seeds, noise, range(start, start + base.numel())).view(base.shape)
            dithered = dither(drawn.table, [drawn.stretch(0, start, base.numel())]).view(base.shape) if drawn.rounded else None
            combine(item, out, base, total, dithered, None if item.mask is None else item.mask.keep(base, start))


def _fused(item: Item, seeds: Sequence[int], drawn: Drawn, noise: Shaped) -> bool:
    """Whether one compiled pass has done it."""
    plain = len(seeds) == 1 and item.mask is None and not drawn.rounded
    if not (plain and item.numel > SMALL and flat(item) and available(item.base.device.type)):
        return False
    place = Place(item.key, item.shape, item.base.device)
    return noise.add(item.out.detach(), item.base.detach(), seeds[0], place, item.decay, item.coefficients[0])


def _total(item: Item, seeds: Sequence[int], noise: Shaped, where: Where) -> Tensor:
    place = Place(item.key, item.shape, item.base.device)
    total = noise.total(seeds, item.coefficients, place, where, compute_dtype(item.base.dtype))
    return total if total.dim() else total.expand(len(where) if isinstance(where, range) else where.shape)


def _listed(item: Item, seeds: Sequence[int], drawn: Drawn, noise: Shaped, named: Tensor) -> None:
    index, own = located(item, named)
    base = item.base if item.places is not None else take(item.base, own)
    dithered = dither_at(index, drawn.rounding) if drawn.rounded else None
    put_moved(item, own, moved(base, item.decay, _total(item, seeds, noise, index.long()), dithered, None, available(base.device.type)))


def _region(item: Item, seeds: Sequence[int], drawn: Drawn, noise: Shaped, region: Region) -> None:
    """A part of a sharded parameter."""
    base = item.base.detach().contiguous().view(-1)
    out = base if item.out is item.base else item.out.detach().contiguous().view(-1)
    for begin in range(0, base.numel(), PACK):
        part = slice(begin, begin + PACK)
        index = region.index_of(begin, min(begin + PACK, base.numel()), base.device)
        dithered = dither_at(index, drawn.rounding) if drawn.rounded else None
        keep = None if item.mask is None else item.mask.at(index, base[part])
        combine(item, out[part], base[part], _total(item, seeds, noise, index), dithered, keep)
    if out.data_ptr() != item.out.data_ptr():
        item.out.copy_(out.view(item.out.shape))
