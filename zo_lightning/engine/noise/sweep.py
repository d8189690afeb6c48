"""One pass over a list of tensors: out <- decay * base + sum_j c_j z(seed_j), without z ever being stored as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Elementwise, Noise
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.dither import dither_at
from zo_lightning.engine.noise.flat import Small, moved, step_flat, total_of
from zo_lightning.engine.noise.large import MANY, PACK, SMALL, large, some_rows
from zo_lightning.engine.noise.members import Listed, Members
from zo_lightning.engine.noise.places import located, put_moved, take
from zo_lightning.engine.noise.region import Region
from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.noise.shaped import Place, Shaped, shaped
from zo_lightning.engine.noise.sphere import Scaled
from zo_lightning.engine.seeds import stream


class Item(NamedTuple):
    """One tensor of a sweep: where the result goes (may be `base` itself), the weights, the parameter's key, its scalars.

    With `rows` (int64, repetitions allowed), only these rows of a matrix need to be written; the others of a large one are not. With
    a `mask`, elements outside of it become `base`, undecayed. With `places` (int64), `out` and `base` hold these elements of the parameter
    alone, one-dimensional, and `whole` is its shape; with a `region`, those of the region, and `mask` is that of the whole parameter.
    """

    out: Tensor
    base: Tensor
    key: int
    decay: float
    coefficients: tuple[float, ...]
    rows: Tensor | None = None
    mask: Members | None = None
    places: Tensor | None = None
    region: Region | None = None
    whole: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        if self.whole is not None:
            return self.whole
        return self.base.shape if self.region is None else torch.Size(self.region.shape)

    @property
    def numel(self) -> int:
        """Elements of the parameter, which decide how a part of it is done: as all of it would be."""
        return self.base.numel() if self.region is None else self.region.numel


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
        if isinstance(noise, Elementwise):
            _sweep_device(here, keys_of(here, [(seeds, rounding)], device), noise, device, done)
        elif isinstance(noise, Scaled):
            scaled: list[Item] = []
            try:
                own = [_scaled(item, seeds, noise, device) for item in here]
                _sweep_device(own, keys_of(own, [(seeds, rounding)], device), noise.inner, device, scaled)
            finally:
                finished = {id(item.out) for item in scaled}
                done.extend(item for item in here if id(item.out) in finished)
        elif isinstance(noise, Shaped):
            noise.prepare(seeds, [Place(item.key, item.shape, device) for item in here])
            for item, drawn in zip(here, keys_of(here, [((), rounding)], device)[0], strict=True):
                shaped(item, seeds, drawn, noise)
                done.append(item)
        else:
            raise TypeError(f"{noise!r} is no Elementwise, Scaled or Shaped noise.")


def _scaled(item: Item, seeds: Sequence[int], noise: Scaled, device: torch.device) -> Item:
    scales = [noise.scale(seed, item.key, item.shape, device) for seed in seeds]
    return item._replace(coefficients=tuple(c * s for c, s in zip(item.coefficients, scales, strict=True)))


def joins(tensors: Sequence[Tensor], noise: Noise) -> bool:
    """Whether `sweep_both` is there for these: small tensors of one kind, all at once, that are not rounded; on a device with kernels."""
    if not isinstance(noise, Elementwise):
        return False
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    small = len(kinds) == 1 and all(0 < tensor.numel() <= SMALL for tensor in tensors) and compiles(tensors)
    return small and sum(t.numel() for t in tensors) <= PACK and not rounds(tensors[0].dtype) and noise.joins([t.numel() for t in tensors])


@torch.no_grad()
def sweep_both(items: Sequence[Item], opposite: Sequence[Tensor], seed: int, noise: Noise) -> None:
    """`sweep`, and the same with all coefficients negated into the tensors `opposite`, for one generation of the noise.

    For bases that it `joins`, on a device where kernels are compiled; undecayed, with one coefficient each, and no mask.
    """
    if not isinstance(noise, Elementwise):
        raise TypeError(f"{noise!r} has no kernels.")
    small = Small([item.base for item in items])
    keys = keys_of(items, [((seed,), None)], small.device)[0]
    sides = small.both_sides(keys, [item.coefficients[0] for item in items], noise)
    small.scatter(sides[0], [item.out for item in items])
    small.scatter(sides[1], opposite)


def keys_of(items: Sequence[Item], changes: Sequence[tuple[Sequence[int], int | None]], device: torch.device) -> list[list[Drawn]]:
    """For each (seeds, rounding seed) the keys of each item, which are views of one table."""
    streams = tuple((item.key, rounds(item.base.dtype), item.region) for item in items)
    rounded = any(each for _, each, _ in streams)
    wanted = tuple((tuple(seeds), rounding if rounded else None) for seeds, rounding in changes)
    few = len(streams) * sum(len(seeds) + 1 for seeds, _ in wanted) <= _KEPT_KEYS
    return (_drawn if few else _drawn.__wrapped__)(streams, wanted, device)


_KEPT_KEYS = 1 << 12
"""Larger tables are made anew; the sweeps of a step want the same one: both sides, and the update of weights that round nothing."""


@functools.lru_cache(maxsize=8)
def _drawn(
    streams: tuple[tuple[int, bool, Region | None], ...], changes: tuple[tuple[tuple[int, ...], int | None], ...], device: torch.device
) -> list[list[Drawn]]:
    """The same for the (key, whether its weights are rounded, region) of each item; nobody writes to it."""
    rows: list[tuple[int, int, int]] = []
    places: list[list[tuple[int, int, bool, Region | None]]] = []
    for seeds, rounding in changes:
        own = []
        for key, rounded, region in streams:
            own.append((len(rows), len(seeds), rounded and rounding is not None, region))
            rows += [stream(seed, key) for seed in seeds]
            if rounded and rounding is not None:
                rows.append(stream(rounding, key, b"zo.round"))
        places.append(own)
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3).to(device, non_blocking=True)
    return [[Drawn(table, *place) for place in own] for own in places]


def _sweep_device(items: list[Item], keys: list[list[Drawn]], noise: Elementwise, device: torch.device, done: list[Item]) -> None:
    small: dict[torch.dtype, list[tuple[Item, Drawn]]] = {}
    listed: dict[torch.dtype, list[tuple[Item, Drawn]]] = {}
    fused = worth(item.numel for item in items) and available(device.type)
    for item, drawn in zip(items, keys[0], strict=True):
        numel = item.numel
        if item.places is not None or isinstance(item.mask, Listed):
            listed.setdefault(item.base.dtype, []).append((item, drawn))
            continue
        if numel <= SMALL:
            small.setdefault(item.base.dtype, []).append((item, drawn))
            continue
        if item.rows is not None:
            some_rows(item, item.rows, drawn, functools.partial(_total_at, item, drawn, noise))
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
    return worth(tensor.numel() for tensor in tensors)


def worth(sizes: Iterable[int]) -> bool:
    """The same for parameters of these sizes."""
    found = list(sizes)
    return any(size > SMALL for size in found) or sum(found) > MANY


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


def _packed(pack: Sequence[tuple[Item, Drawn]], noise: Elementwise, fused: bool) -> None:
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
        masks_of(small, [item.mask for item in items], [item.region for item in items]),
    )
    small.scatter(result, [item.out for item in items])


def masks_of(small: Small, masks: Sequence[Members | None], regions: Sequence[Region | None] = ()) -> Callable[[Tensor], Tensor] | None:
    """keep(flat values) for small tensors; None where no tensor has a mask."""
    if all(mask is None for mask in masks):
        return None
    if any(region is not None for region in regions):
        return lambda values: torch.cat([_kept(*one) for one in zip(values.split(small.lengths), masks, regions, strict=True)])
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


def _kept(values: Tensor, mask: Members | None, region: Region | None) -> Tensor:
    if mask is None:
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)
    return mask.keep(values, 0) if region is None else mask.at(region.index(values.device), values)


def _total_at(item: Item, drawn: Drawn, noise: Elementwise, index: Tensor) -> Tensor:
    return total_of((noise.at(index, drawn.key(j)) for j in range(drawn.terms)), item.coefficients, item.base)


def elements(listed: Sequence[tuple[Item, Drawn]], noise: Elementwise) -> None:
    """Of tensors of one dtype the elements that their lists name, all of them together."""
    if not listed:
        return
    items, drawn = [item for item, _ in listed], [own for _, own in listed]
    named = [item.places if item.places is not None else item.mask.index for item in items]  # type: ignore[union-attr]
    indices, places = (list(column) for column in zip(*map(located, items, named), strict=True))
    bases = [item.base if item.places is not None else take(item.base, place) for item, place in zip(items, places, strict=True)]
    small, index = Small(bases), torch.cat(indices).long()
    rows = torch.tensor([own.row for own in drawn], device=small.device).repeat_interleave(torch.tensor(small.lengths, device=small.device))
    keys = [drawn[0].table[rows + j].t() for j in range(drawn[0].terms + drawn[0].rounded)]
    base = small.gather()
    coefficients = [small.spread([item.coefficients[j] for item in items]) for j in range(drawn[0].terms)]
    total = total_of((noise.at(index, key) for key in keys[: drawn[0].terms]), coefficients, base)
    dithered = dither_at(index, keys[-1]) if drawn[0].rounded else None
    result = moved(base, small.spread([item.decay for item in items]), total, dithered, None, available(small.device.type))
    for item, own, piece in zip(items, places, result.split(small.lengths), strict=True):
        put_moved(item, own, piece)
