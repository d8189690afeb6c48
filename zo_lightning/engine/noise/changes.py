"""Many updates one after another in few passes over the weights: every tensor stays in cache while all of them are applied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Elementwise, Noise, compute_dtype
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.flat import Small, step_flat
from zo_lightning.engine.noise.large import SMALL, compiled, flat, large
from zo_lightning.engine.noise.members import Listed, Members
from zo_lightning.engine.noise.region import Region
from zo_lightning.engine.noise.sweep import Item, elements, keys_of, masks_of, packs, sweep, worth

CHUNK = 1 << 21
"""Elements of a large tensor that stay in cache together."""


class Through(Protocol):
    """What an estimate goes through, where a step is another function of it than a multiple."""

    def moves(self, group: int) -> bool:
        """Whether weights of a group are moved at all."""

    def move(self, key: int, group: int, theta: Tensor, estimate: Tensor, direction: Callable[[int], Tensor]) -> None:
        """Move `theta`, in place, by the estimate of its shape and dtype; `direction(j)` is z(seeds[j]). Both may be written to."""


class Change(NamedTuple):
    """One update: theta <- decay theta + sum_j c_j z(seeds[j]), with (decay, (c_1, ..., c_n)) of each parameter group.

    `rounding` is the seed of the stochastic rounding of 16-bit weights; None rounds to nearest. With `through` the sum is the estimate that
    is given to it, after the decay.
    """

    seeds: tuple[int, ...]
    steps: tuple[tuple[float, tuple[float, ...]], ...]
    rounding: int | None
    through: Through | None = None


class Weights(Protocol):
    """A tensor that changes, with its parameter's key and group, the size of its noise, its lower bound, which part of the parameter it is:
    a `parameters.Trained`.
    """

    @property
    def tensor(self) -> Tensor: ...

    @property
    def key(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def unit(self) -> float: ...

    @property
    def least(self) -> float | None: ...

    @property
    def region(self) -> Region | None: ...


def step_of(change: Change, weights: Weights) -> tuple[float, tuple[float, ...]]:
    """(decay, (c_1, ..., c_n)) for one tensor."""
    decay, coefficients = change.steps[weights.group]
    return decay, coefficients if weights.unit == 1.0 else tuple(c * weights.unit for c in coefficients)


def moves(change: Change, group: int) -> bool:
    """Whether a change moves weights of a group."""
    if change.through is not None:
        return change.through.moves(group)
    decay, coefficients = change.steps[group]
    return decay != 1.0 or any(coefficients)


def hold(weights: Sequence[Weights]) -> None:
    """theta <- max(least, theta) where there is a bound."""
    for w in weights:
        if w.least is not None:
            w.tensor.detach().clamp_(min=w.least)


@torch.no_grad()
def apply_changes(
    weights: Sequence[Weights], changes: Sequence[Change], noise: Noise, masks: Mapping[int, Members] = MappingProxyType({})
) -> None:
    """Apply the changes in their order; bit for bit what a `sweep` for each of them does. `masks` are by the key of the parameter."""
    if not isinstance(noise, Elementwise):
        for change in changes:
            _sweep(weights, change, noise, masks)
            hold(weights)
        return
    bounded = [w for w in weights if w.least is not None]
    _apply([w for w in weights if w.least is None], changes, noise, masks)
    for change in changes if bounded else ():
        _apply(bounded, [change], noise, masks)
        hold(bounded)


def _sweep(weights: Sequence[Weights], change: Change, noise: Noise, masks: Mapping[int, Members]) -> None:
    items = [
        Item(theta, theta, w.key, *step_of(change, w), mask=masks.get(w.key), region=w.region)
        for w, theta in ((w, w.tensor.detach()) for w in weights)
    ]
    sweep([item for item in items if not _nothing(item)], change.seeds, noise, rounding=change.rounding)


@torch.no_grad()
def apply_through(weights: Sequence[Weights], change: Change, noise: Noise, masks: Mapping[int, Members] = MappingProxyType({})) -> None:
    """Apply a change that goes `through` something, one tensor after another; `masks` are by the key of the parameter."""
    through = change.through
    if through is None:
        raise TypeError("The change goes through nothing.")
    for w in weights:
        theta, (decay, coefficients) = w.tensor.detach(), change.steps[w.group]
        estimate, keep = materialized(w, change.seeds, coefficients, noise, masks.get(w.key))
        moved = theta if keep is None and w.unit == 1.0 else theta / w.unit
        if decay != 1.0:
            moved.mul_(decay)
        through.move(w.key, w.group, moved, estimate, partial(_direction, w, change, noise, masks.get(w.key)))
        if moved is not theta:
            theta.copy_(moved * w.unit if keep is None else torch.where(keep, moved * w.unit, theta))
    hold(weights)


def _direction(w: Weights, change: Change, noise: Noise, mask: Members | None, term: int) -> Tensor:
    return materialized(w, change.seeds[term : term + 1], (1.0,), noise, mask)[0]


def materialized(
    w: Weights, seeds: Sequence[int], coefficients: Sequence[float], noise: Noise, mask: Members | None
) -> tuple[Tensor, Tensor | None]:
    """(sum_j c_j m z(s_j) of a tensor in float32, or float64 for such weights; the mask m as a bool tensor, None where all is trained)."""
    theta = w.tensor.detach()
    found = torch.zeros(theta.shape, dtype=compute_dtype(theta.dtype), device=theta.device)
    sweep([Item(found, found, w.key, 1.0, tuple(coefficients), region=w.region)], seeds, noise)
    keep = _kept(w, theta, mask)
    if keep is not None:
        found.masked_fill_(~keep, 0.0)
    return found, keep


def _kept(w: Weights, theta: Tensor, mask: Members | None) -> Tensor | None:
    """The mask as a bool tensor; None where all of it is trained."""
    if mask is None:
        return None
    index = torch.arange(theta.numel(), device=theta.device) if w.region is None else w.region.index(theta.device)
    return mask.at(index, theta.reshape(-1)).view(theta.shape)


def _apply(weights: Sequence[Weights], changes: Sequence[Change], noise: Elementwise, masks: Mapping[int, Members]) -> None:
    for device in {w.tensor.device for w in weights} if changes else ():
        here = [w for w in weights if w.tensor.device == device and w.tensor.numel()]
        tensors = [w.tensor.detach() for w in here]
        items = [
            Item(tensor, tensor, w.key, 1.0, (), mask=masks.get(w.key), region=w.region) for w, tensor in zip(here, tensors, strict=True)
        ]
        keys = keys_of(items, [(change.seeds, change.rounding) for change in changes], device)
        each = [[_item(item, *step_of(change, w)) for w, item in zip(here, items, strict=True)] for change in changes]
        table = [[(own[i], drawn[i]) for own, drawn in zip(each, keys, strict=True)] for i in range(len(here))]
        fused = worth(item.numel for item in items) and available(device.type)
        small: dict[torch.dtype, list[tuple[Item, Drawn]]] = {}
        index: dict[int, list[tuple[Item, Drawn]]] = {}
        listed: dict[torch.dtype, list[list[tuple[Item, Drawn]]]] = {}
        for item, steps in zip(items, table, strict=True):
            if isinstance(item.mask, Listed):
                listed.setdefault(item.base.dtype, []).append(steps)
            elif item.numel <= SMALL:
                small.setdefault(item.base.dtype, []).append((item, steps[0][1]))
                index[id(item.base)] = steps
            else:
                _large(steps, noise)
        for some in listed.values():
            for now in zip(*some, strict=True):
                elements([(item, drawn) for item, drawn in now if not _nothing(item)], noise)
        for group in small.values():
            for pack in packs(group):
                _small([index[id(item.base)] for item, _ in pack], noise, fused)


def _item(item: Item, decay: float, coefficients: tuple[float, ...]) -> Item:
    return item._replace(decay=decay, coefficients=coefficients)


def _nothing(item: Item) -> bool:
    return item.decay == 1.0 and not any(item.coefficients)


def _large(steps: Sequence[tuple[Item, Drawn]], noise: Elementwise) -> None:
    first = steps[0][0]
    if first.region is not None or not (flat(first) and available(first.base.device.type)):
        for item, drawn in steps:
            if not _nothing(item):
                large(item, drawn, noise)
        return
    whole = first.base.view(-1)
    for at in range(0, whole.numel(), CHUNK):
        piece = whole[at : at + CHUNK]
        for item, drawn in steps:
            if not _nothing(item):
                compiled(item, piece, piece, at, drawn, noise)


def _small(tensors: Sequence[Sequence[tuple[Item, Drawn]]], noise: Elementwise, fused: bool) -> None:
    """Several small tensors, each with all its steps."""
    outs = [steps[0][0].base for steps in tensors]
    small = Small(outs)
    values = small.gather()
    keep = masks_of(small, [steps[0][0].mask for steps in tensors], [steps[0][0].region for steps in tensors])
    for now in zip(*tensors, strict=True):
        items = [item for item, _ in now]
        if all(map(_nothing, items)):
            continue
        steps = [(item.decay, item.coefficients) for item in items]
        values = step_flat(small, values, steps, [drawn for _, drawn in now], noise, fused, keep).to(small.dtype)
    small.scatter(values, outs)
