"""Large tensors, one at a time: in one compiled pass where it can be, else piece by piece, with noise of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Elementwise, coefficients_of, compute_dtype
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.dither import dither, dither_at
from zo_lightning.engine.noise.flat import moved, total_of
from zo_lightning.engine.noise.inside import choose_into
from zo_lightning.engine.noise.region import Part, Region
from zo_lightning.engine.noise.rounding import settle

if TYPE_CHECKING:
    from zo_lightning.engine.noise.sweep import Item

SMALL = 1 << 15
"""Tensors of at most this many elements are done together: their noise is generated in one go."""
MANY = 1 << 17
"""For so many elements in small tensors alone, kernels are compiled too."""
PACK = 1 << 19
"""At most so many elements of noise exist at a time."""


def combine(item: Item, out: Tensor, base: Tensor, total: Tensor, dithered: Tensor | None, keep: Tensor | None) -> None:
    """out <- decay * base + total, of the shape of `base`, rounded with `dithered`; out <- base outside `keep`."""
    if dithered is None and keep is None and item.decay == 1.0 and out.shape == base.shape:
        torch.add(base, total, out=out)
    else:
        out.copy_(moved(base, item.decay, total, dithered, keep, available(base.device.type)))


def large(item: Item, drawn: Drawn, noise: Elementwise) -> None:
    """A large tensor: in one compiled pass where it can be, else in chunks of bounded size."""
    if item.region is not None:
        part_of(item, item.region, drawn, noise)
        return
    if flat(item) and available(item.base.device.type):
        base = item.base.detach().view(-1)
        out = base if item.out is item.base else item.out.detach().view(-1)
        compiled(item, out, base, 0, drawn, noise)
        return
    for out, base, start in chunks(item.out, item.base, 0):
        where = [drawn.stretch(j, start, base.numel()) for j in range(drawn.terms + drawn.rounded)]
        values = [noise.values(drawn.table, [stretch], torch.float32).view(base.shape) for stretch in where[: drawn.terms]]
        dithered = dither(drawn.table, where[-1:]).view(base.shape) if drawn.rounded else None
        keep = None if item.mask is None else item.mask.keep(base, start)
        combine(item, out, base, total_of(values, item.coefficients, base), dithered, keep)


def some_rows(item: Item, rows: Tensor, drawn: Drawn, total: Callable[[Tensor], Tensor]) -> None:
    """Some rows of a matrix, for a lookup that reads no others; `total(index)` is the noise of elements."""
    width = item.base.shape[1]
    for some in rows.flatten().split(max(1, PACK // 8 // width)):  # there are some ten temporary tensors of this size
        index = some[:, None] * width + torch.arange(width, device=rows.device)
        base = item.base[some]
        out = torch.empty_like(base)
        dithered = dither_at(index, drawn.rounding) if drawn.rounded else None
        keep = None if item.mask is None else item.mask.at(index, base)
        combine(item, out, base, total(index), dithered, keep)
        item.out[some] = out


def flat(item: Item) -> bool:
    """Whether both tensors are contiguous."""
    return item.base.is_contiguous() and item.out.is_contiguous()


def chunks(out: Tensor, base: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(out, base, index of the first element) of pieces of at most PACK elements, consecutive in logical order."""
    if base.numel() <= PACK:
        yield out, base, start
        return
    if base.is_contiguous() and out.is_contiguous():
        flat_out, flat_base = out.view(-1), base.view(-1)
        for at in range(0, base.numel(), PACK):
            yield flat_out[at : at + PACK], flat_base[at : at + PACK], start + at
        return
    row = base[0].numel()
    step = max(1, PACK // row)
    for at in range(0, base.shape[0], step):
        piece = slice(at, at + step)
        if row > PACK:
            yield from chunks(out[at], base[at], start + at * row)
        else:
            yield out[piece], base[piece], start + at * row


def compiled(item: Item, out: Tensor, base: Tensor, start: int, drawn: Drawn, noise: Elementwise) -> None:
    """One fused pass over flat tensors for one term, and for several where the noise has one; else they are summed first, piece by piece.

    `out` and `base` (which may be one object) are the part of the item that begins at element `start`, a multiple of 2**19.
    """
    dtype, device = compute_dtype(base.dtype), base.device
    if len(item.coefficients) == 1:
        c = item.coefficients[0]
        if drawn.rounded:
            noise.add_rounded(
                out, base, drawn.key(0), drawn.rounding, start, coefficients_of((item.decay - 1.0, c), dtype, device), item.mask
            )
        else:
            noise.add(out, base, drawn.key(0), start, coefficients_of((item.decay, c), dtype, device), item.mask)
        return
    if out is base and 1 < drawn.terms <= noise.fuses and item.mask is None and not drawn.rounded:
        noise.add_terms(base, drawn.keys, start, coefficients_of((item.decay, *item.coefficients), dtype, device))
        return
    for at in range(0, base.numel(), PACK):
        part = slice(at, at + PACK)
        piece, target = base[part], out[part]
        total = torch.zeros(piece.numel(), dtype=dtype, device=device)
        noise.accumulate(total, drawn.keys, start + at, item.coefficients)
        if drawn.rounded:
            shrink = coefficients_of(item.decay - 1.0, dtype, device)
            settle(target, target if out is base else piece, total, drawn.rounding, start + at, shrink, item.mask)
        elif item.mask is None:
            target.copy_(moved(piece, item.decay, total, None, None, fused=True))
        else:
            choose_into(target, piece, moved(piece, item.decay, total, None, None, fused=True), item.mask, start + at)


def part_of(item: Item, region: Region, drawn: Drawn, noise: Elementwise) -> None:
    """A part of a large tensor, with the bits that a pass over the whole of it would give."""
    base = item.base.detach().contiguous().view(-1)
    out = base if item.out is item.base else item.out.detach().contiguous().view(-1)
    fused = available(base.device.type)
    begin, end = _direct(region, base.numel(), noise.grain) if fused else (0, 0)
    if begin < end and region.start is not None:
        target = out[begin:end]
        compiled(item, target, target if out is base else base[begin:end], region.start + begin, drawn, noise)
    for first, last in ((0, begin), (end, base.numel())):
        for part in region.parts(PACK, first, last):
            _piece(item, out[part.begin : part.end], base[part.begin : part.end], part, region, drawn, noise, fused)
    if out.data_ptr() != item.out.data_ptr():
        item.out.copy_(out.view(item.out.shape))


def _direct(region: Region, numel: int, grain: int) -> tuple[int, int]:
    """Which of its `numel` elements a compiled pass of their own can do: from one multiple of `grain` to another, or to the end."""
    if region.start is None:
        return 0, 0
    begin, stop = -region.start % grain, region.start + numel
    end = numel if stop == region.numel else stop // grain * grain - region.start
    return (begin, end) if begin < end else (0, 0)


def _piece(item: Item, out: Tensor, base: Tensor, part: Part, region: Region, drawn: Drawn, noise: Elementwise, fused: bool) -> None:
    """Elements that lie in one stretch of PACK elements of the parameter, whose noise is made for all of them."""
    keep = None
    if item.mask is not None:
        keep = item.mask.at(region.index_of(part.begin, part.end, base.device), base)
    if not fused:
        start, length = part.first, part.last - part.first
        dithered = part.pick(dither(drawn.table, [drawn.stretch(drawn.terms, start, length)]), start) if drawn.rounded else None
        values = [part.pick(noise.values(drawn.table, [drawn.stretch(j, start, length)], torch.float32), start) for j in range(drawn.terms)]
        combine(item, out, base, total_of(values, item.coefficients, base), dithered, keep)
        return
    start = part.first // PACK * PACK
    length = min(PACK, region.numel - start)
    dtype, device = compute_dtype(base.dtype), base.device
    dithered = part.pick(dither(drawn.table, [drawn.stretch(drawn.terms, start, length)], fused=True), start) if drawn.rounded else None
    total = torch.zeros(length, dtype=dtype, device=device)
    noise.accumulate(total, drawn.keys, start, item.coefficients)
    out.copy_(moved(base, item.decay, part.pick(total, start), dithered, keep, fused=True))
