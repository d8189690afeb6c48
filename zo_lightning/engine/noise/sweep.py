"""One pass over a list of tensors: out <- decay * base + sum_j c_j z(seed_j), without z ever being stored as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Noise, compute_dtype, constants
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.dither import dither, dither_at
from zo_lightning.engine.noise.flat import Small, moved, step_flat, total_of
from zo_lightning.engine.noise.inside import choose_into
from zo_lightning.engine.noise.members import Listed, Members
from zo_lightning.engine.noise.rounding import rounds, settle
from zo_lightning.engine.seeds import stream

SMALL = 1 << 15
"""Tensors of at most this many elements are done together: their noise is generated in one go."""
MANY = 1 << 17
"""For so many elements in small tensors alone, kernels are compiled too."""
PACK = 1 << 19
"""At most so many elements of noise exist at a time."""


class Item(NamedTuple):
    """One tensor of a sweep: where the result goes (may be `base` itself), the weights, the parameter's key, its scalars.

    With `rows` (int64, repetitions allowed), only these rows of a matrix need to be written; the others of a large one are not. With
    a `mask`, elements outside of it become `base`, undecayed. With `places` (int64), `out` and `base` hold these elements of the parameter
    alone, one-dimensional.
    """

    out: Tensor
    base: Tensor
    key: int
    decay: float
    coefficients: tuple[float, ...]
    rows: Tensor | None = None
    mask: Members | None = None
    places: Tensor | None = None


@torch.no_grad()
def sweep(items: Sequence[Item], seeds: Sequence[int], noise: Noise, done: list[Item] | None = None, rounding: int | None = None) -> None:
    """out <- decay * base + sum_j coefficients[j] * z(seeds[j], key), for every item and inside its mask.

    Weights of any floating dtype and layout; arithmetic in float32 (float64 for float64 weights), one rounding to the dtype of `out` at
    the end: to nearest, or, for 16-bit weights and with a seed `rounding`, stochastically. The sum over j runs in the order of `seeds`, so
    that results do not depend on how tensors are grouped, chunked or compiled. Finished items are appended to `done`.
    """
    done = [] if done is None else done
    for device in {item.base.device for item in items}:
        here = [item for item in items if item.base.device == device and item.base.numel()]
        _sweep_device(here, keys_of(here, [(seeds, rounding)], device), noise, device, done)


def keys_of(items: Sequence[Item], changes: Sequence[tuple[Sequence[int], int | None]], device: torch.device) -> list[list[Drawn]]:
    """For each (seeds, rounding seed) the keys of each item, which are views of one table."""
    rows: list[tuple[int, int, int]] = []
    places: list[list[tuple[int, int, bool]]] = []
    for seeds, rounding in changes:
        own = []
        for item in items:
            rounded = rounding is not None and rounds(item.base.dtype)
            own.append((len(rows), len(seeds), rounded))
            rows += [stream(seed, item.key) for seed in seeds]
            if rounded and rounding is not None:
                rows.append(stream(rounding, item.key, b"zo.round"))
        places.append(own)
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).to(device, non_blocking=True)
    return [[Drawn(table, *place) for place in own] for own in places]


def _sweep_device(items: list[Item], keys: list[list[Drawn]], noise: Noise, device: torch.device, done: list[Item]) -> None:
    small: dict[torch.dtype, list[tuple[Item, Drawn]]] = {}
    listed: dict[torch.dtype, list[tuple[Item, Drawn]]] = {}
    fused = compiles([item.base for item in items]) and available(device.type)
    for item, drawn in zip(items, keys[0], strict=True):
        numel = item.base.numel()
        if item.places is not None or isinstance(item.mask, Listed):
            listed.setdefault(item.base.dtype, []).append((item, drawn))
            continue
        if numel <= SMALL:
            small.setdefault(item.base.dtype, []).append((item, drawn))
            continue
        if item.rows is not None:
            _rows(item, item.rows, drawn, noise)
        else:
            large(item, drawn, noise)
        done.append(item)
    for group in small.values():
        for pack in packs(group):
            _packed(pack, noise, fused)
            done.extend(item for item, _ in pack)
    for some in listed.values():
        elements(some, noise)
        done.extend(item for item, _ in some)


def compiles(tensors: Sequence[Tensor]) -> bool:
    """Whether a sweep over these tensors is worth compiled kernels."""
    return any(tensor.numel() > SMALL for tensor in tensors) or sum(tensor.numel() for tensor in tensors) > MANY


def packs(group: Sequence[tuple[Item, Drawn]]) -> Iterator[list[tuple[Item, Drawn]]]:
    """Small tensors together, as long as they have at most PACK elements."""
    pack: list[tuple[Item, Drawn]] = []
    size = 0
    for item, drawn in group:
        if pack and size + item.base.numel() > PACK:
            yield pack
            pack, size = [], 0
        pack.append((item, drawn))
        size += item.base.numel()
    if pack:
        yield pack


def _packed(pack: Sequence[tuple[Item, Drawn]], noise: Noise, fused: bool) -> None:
    """Small tensors as one flat tensor."""
    items = [item for item, _ in pack]
    small = Small([item.base for item in items])
    result = step_flat(
        small,
        small.gather(),
        [(item.decay, item.coefficients) for item in items],
        [drawn for _, drawn in pack],
        noise,
        fused,
        masks_of(small, [item.mask for item in items]),
    )
    small.scatter(result, [item.out for item in items])


def masks_of(small: Small, masks: Sequence[Members | None]) -> Callable[[Tensor], Tensor] | None:
    """keep(flat values) for small tensors; None where no tensor has a mask."""
    if all(mask is None for mask in masks):
        return None
    kinds = {type(mask) for mask in masks if mask is not None}

    def keep(values: Tensor) -> Tensor:
        parts = values.split(small.lengths)
        found = torch.ones(values.shape, dtype=torch.bool, device=values.device)
        for kind in kinds:
            own = [i for i, mask in enumerate(masks) if type(mask) is kind]
            members: list[Members] = [mask for mask in masks if type(mask) is kind]
            kept = kind.together(members, [parts[i] for i in own])
            if len(own) == len(masks):
                return kept
            for i, piece in zip(own, kept.split([small.lengths[i] for i in own]), strict=True):
                found.split(small.lengths)[i].copy_(piece)
        return found

    return keep


def _combine(item: Item, out: Tensor, base: Tensor, drawn: Sequence[Tensor], dithered: Tensor | None, keep: Tensor | None) -> None:
    """out <- decay * base + sum_j c_j z_j, with z_j of the shape of `base`, rounded with `dithered`; out <- base outside `keep`."""
    total = total_of(drawn, item.coefficients, base)
    if dithered is None and keep is None and item.decay == 1.0 and out.shape == base.shape:
        torch.add(base, total, out=out)
    else:
        out.copy_(moved(base, item.decay, total, dithered, keep, available(base.device.type)))


def _rows(item: Item, rows: Tensor, drawn: Drawn, noise: Noise) -> None:
    """Some rows of a matrix, for a lookup that reads no others."""
    width = item.base.shape[1]
    rows = rows.flatten()
    for some in rows.split(max(1, PACK // 8 // width)):  # there are some ten temporary tensors of this size
        index = some[:, None] * width + torch.arange(width, device=rows.device)
        base = item.base[some]
        out = torch.empty_like(base)
        dithered = dither_at(index, drawn.rounding) if drawn.rounded else None
        keep = None if item.mask is None else item.mask.at(index, base)
        _combine(item, out, base, [noise.at(index, drawn.key(j)) for j in range(drawn.terms)], dithered, keep)
        item.out[some] = out


def elements(listed: Sequence[tuple[Item, Drawn]], noise: Noise) -> None:
    """Of tensors of one dtype the elements that their lists name, all of them together."""
    if not listed:
        return
    items, drawn = [item for item, _ in listed], [own for _, own in listed]
    indices = [item.places if item.places is not None else item.mask.index for item in items]  # type: ignore[union-attr]
    bases = [item.base if item.places is not None else take(item.base, index) for item, index in zip(items, indices, strict=True)]
    small, index = Small(bases), torch.cat(indices).long()
    rows = torch.tensor([own.row for own in drawn], device=small.device).repeat_interleave(torch.tensor(small.lengths, device=small.device))
    keys = [drawn[0].table[rows + j].t() for j in range(drawn[0].terms + drawn[0].rounded)]
    base = small.gather()
    coefficients = [small.spread([item.coefficients[j] for item in items]) for j in range(drawn[0].terms)]
    total = total_of((noise.at(index, key) for key in keys[: drawn[0].terms]), coefficients, base)
    dithered = dither_at(index, keys[-1]) if drawn[0].rounded else None
    result = moved(base, small.spread([item.decay for item in items]), total, dithered, None, available(small.device.type))
    for item, own, piece in zip(items, indices, result.split(small.lengths), strict=True):
        if item.places is not None:
            item.out.copy_(piece)
            continue
        if item.out is not item.base:
            item.out.copy_(item.base)
        put(item.out, own, piece)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Elements by their number in logical order."""
    return tensor.view(-1)[index] if tensor.is_contiguous() else tensor[torch.unravel_index(index, tensor.shape)]


def put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write elements by their number in logical order."""
    where = (index.long(),) if tensor.is_contiguous() else torch.unravel_index(index.long(), tensor.shape)
    (tensor.view(-1) if tensor.is_contiguous() else tensor).index_put_(where, values.to(tensor.dtype))


def large(item: Item, drawn: Drawn, noise: Noise) -> None:
    """A large tensor: in one compiled pass where it can be, else in chunks of bounded size."""
    if flat(item) and available(item.base.device.type):
        base = item.base.detach().view(-1)
        out = base if item.out is item.base else item.out.detach().view(-1)
        compiled(item, out, base, 0, drawn, noise)
        return
    for out, base, start in _chunks(item.out, item.base, 0):
        where = [drawn.stretch(j, start, base.numel()) for j in range(drawn.terms + drawn.rounded)]
        values = [noise.values(drawn.table, [stretch], torch.float32).view(base.shape) for stretch in where[: drawn.terms]]
        dithered = dither(drawn.table, where[-1:]).view(base.shape) if drawn.rounded else None
        keep = None if item.mask is None else item.mask.keep(base, start)
        _combine(item, out, base, values, dithered, keep)


def flat(item: Item) -> bool:
    """Whether both tensors are contiguous."""
    return item.base.is_contiguous() and item.out.is_contiguous()


def _chunks(out: Tensor, base: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, int]]:
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
            yield from _chunks(out[at], base[at], start + at * row)
        else:
            yield out[piece], base[piece], start + at * row


def compiled(item: Item, out: Tensor, base: Tensor, start: int, drawn: Drawn, noise: Noise) -> None:
    """One fused pass over flat tensors for one term; several terms are summed first, in a buffer of bounded size.

    `out` and `base` (which may be one object) are the part of the item that begins at element `start`, a multiple of 2**19.
    """
    dtype, device = compute_dtype(base.dtype), base.device
    if len(item.coefficients) == 1:
        c = item.coefficients[0]
        if drawn.rounded:
            noise.add_rounded(out, base, drawn.key(0), drawn.rounding, start, constants((item.decay - 1.0, c), dtype, device), item.mask)
        else:
            noise.add(out, base, drawn.key(0), start, constants((item.decay, c), dtype, device), item.mask)
        return
    for at in range(0, base.numel(), PACK):
        part = slice(at, at + PACK)
        piece, target = base[part], out[part]
        total = torch.zeros(piece.numel(), dtype=dtype, device=device)
        for j, c in enumerate(item.coefficients):
            noise.add(total, total, drawn.key(j), start + at, constants((1.0, c), dtype, device))
        if drawn.rounded:
            shrink = constants(item.decay - 1.0, dtype, device)
            settle(target, target if out is base else piece, total, drawn.rounding, start + at, shrink, item.mask)
        elif item.mask is None:
            target.copy_(moved(piece, item.decay, total, None, None, fused=True))
        else:
            choose_into(target, piece, moved(piece, item.decay, total, None, None, fused=True), item.mask, start + at)
