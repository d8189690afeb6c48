"""The weights that are trained, one by one: as points of a step, and displaced in place, with their bits put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.masks import Masks
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.noise.base import compute_dtype
from zo_lightning.engine.noise.basis import LARGEST, coordinate_of, low_bits, seed_of
from zo_lightning.engine.noise.dither import dither_at
from zo_lightning.engine.noise.flat import moved
from zo_lightning.engine.noise.members import Listed, Members
from zo_lightning.engine.noise.places import take
from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency import Residency
from zo_lightning.engine.residency.base import eps_of
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.seeds import stream

MOST = (1 << 16) - 2
"""Points of a step beside the one at the weights; step logs have room for as many (trajectory/records.py)."""


class Queries:
    """What an estimator makes the points of a step of: `queries(i)` is the seed of query i, `coordinates()` names the trained weights."""

    def __init__(self, noise: Noise, run_seed: int, step: int, trained: Sequence[Trained], masks: Masks) -> None:
        self._noise, self._run_seed, self._step = noise, run_seed, step
        self._trained, self._masks = trained, masks

    def __call__(self, query: int) -> int:
        return self._noise.seed(self._run_seed, self._step, query)

    def coordinates(self, each: int) -> list[int]:
        """The seed of each trained element, parameter by parameter in their order; a point costs `each` evaluations.

        ValueError where there are none, where they are too many for a step, and where two parameters can't be told apart.
        """
        trained = [p for p in self._trained if self._masks.trains(p.key)]
        _check_keys(trained)
        seeds: list[int] = []
        for p in trained:
            mask = self._masks.of(p.key)
            count = len(mask.index) if isinstance(mask, Listed) else 0 if mask is not None else p.numel
            if (len(seeds) + count) * each > MOST:
                raise ValueError(_TOO_MANY.format(most=MOST // each, name=p.name, least=len(seeds) + count))
            seeds += [seed_of(p.key, element) for element in _elements(p, mask)]
        if len(seeds) * each > MOST:
            raise ValueError(_TOO_MANY.format(most=MOST // each, name=trained[-1].name, least=len(seeds)))
        if not seeds:
            raise ValueError("Coordinatewise has no weight to displace: the mask trains none. Give it a larger density.")
        return seeds


def _check_keys(trained: Sequence[Trained]) -> None:
    seen: dict[int, Trained] = {}
    for p in trained:
        other = seen.setdefault(low_bits(p.key), p)
        if other is not p:
            raise ValueError(
                f"Coordinatewise can't tell the weights of {p.name!r} and {other.name!r} apart: 32 bits of their keys agree. Rename one."
            )
        if p.numel > LARGEST:
            raise ValueError(f"Coordinatewise numbers {LARGEST} elements of a parameter, and {p.name!r} has {p.numel}. Freeze it.")


def _elements(p: Trained, mask: Members | None) -> Sequence[int]:
    """What a mask trains of a parameter, ascending; masks that follow the weights are those of the weights at hand."""
    if mask is None:
        return range(p.numel)
    if isinstance(mask, Listed):
        return mask.index.tolist()
    weights = p.tensor.detach()
    return mask.to(weights.device).keep(weights.reshape(-1), 0).nonzero().flatten().tolist()


class Nudges:
    """The points of a micro-batch, each displacing one element: whatever the residency, the element itself is written."""

    def __init__(self, residency: Residency, points: Sequence[Displacement], eps: Sequence[float], rounding: int) -> None:
        self._residency, self._eps, self._rounding = residency, eps, rounding
        by_key = {low_bits(p.key): p for p in residency.trained}
        self._where = [coordinate_of(point[0][0]) if point else None for point in points]
        self._multiples = [point[0][1] if point else 0.0 for point in points]
        self.parameters = [None if where is None else by_key[where.key] for where in self._where]
        """Of each point the parameter that it displaces an element of."""

    def at(self, index: int) -> AbstractContextManager[None]:
        """Inside it, forward passes see the point."""
        p = self.parameters[index]
        if p is None:
            return nullcontext()
        place, displaced = self._displaced(p, [index])
        swap = Swap([(p, Listed(place))])
        swap.displaced = [displaced]
        return self._residency.swapped(swap)

    def stack(self, indices: Sequence[int]) -> Tensor:
        """k copies of the parameter that these points displace, of shape (k, *shape)."""
        p = self.parameters[indices[0]]
        if p is None:
            raise ValueError("The point displaces nothing.")
        place, displaced = self._displaced(p, indices)
        weights = p.tensor.detach()
        copies = weights.reshape(1, -1).repeat(len(indices), 1)
        copies[torch.arange(len(indices), device=weights.device), place] = displaced
        return copies.view(len(indices), *weights.shape)

    def groups(self, batch: int) -> Iterator[list[int]]:
        """The points in their order, up to `batch` of one parameter together; the first one is alone."""
        own: list[int] = []
        for index, p in enumerate(self.parameters):
            if own and (len(own) == batch or own == [0] or self.parameters[own[-1]] is not p):
                yield own
                own = []
            own.append(index)
        if own:
            yield own

    @torch.no_grad()
    def _displaced(self, p: Trained, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(the elements of these points, the value of each there), of the weights' dtype."""
        weights = p.tensor.detach()
        place = torch.tensor([where.element for i in indices if (where := self._where[i]) is not None], device=weights.device)
        steps = [self._multiples[i] * eps_of(p, self._eps) for i in indices]
        total = torch.tensor(steps, dtype=compute_dtype(weights.dtype), device=weights.device)
        dithered = None
        if rounds(weights.dtype):
            key = torch.tensor(stream(self._rounding, p.key, b"zo.round"), dtype=torch.int32, device=weights.device)
            dithered = dither_at(place, key)
        return place, moved(take(weights, place), 1.0, total, dithered, None, False).to(weights.dtype)


_TOO_MANY = (
    "Invalid estimator: Coordinatewise evaluates a point for each trained weight, at most {most} a step, and {least} or more are trained "
    "up to {name!r}. Give a mask of fewer (SparseMask, mask=Mask('random', density=0.001)), freeze parameters, or use SPSA()."
)
