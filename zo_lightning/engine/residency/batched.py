"""weights="batched": all points of a step in one forward pass, whose weights are shared and never written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.factored import Factored
from zo_lightning.engine.messages import check_count
from zo_lightning.engine.noise import Noise, Place, Shaped
from zo_lightning.engine.noise.base import Stretch, compute_dtype
from zo_lightning.engine.noise.dither import dither
from zo_lightning.engine.noise.flat import moved
from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency, eps_of
from zo_lightning.engine.residency.turns import Turns
from zo_lightning.engine.residency.watch import uncompiled
from zo_lightning.engine.seeds import stream
from zo_lightning.engine.shown import Read, Stack, in_parts, places_of, shown_instead

_OTHERWISE = 'weights="exact" or "copy"'


@dataclass(frozen=True)
class Batched:
    """weights=Batched(...): points of a step together in one forward pass (`Population`).

    Args:
        members: at most so many points in one forward pass, each of which has activations of its own; None: all of a step but the first.

    Raises ValueError for others.
    """

    members: int | None = None

    def __post_init__(self) -> None:
        if self.members is not None:
            check_count("members", self.members, "the points of one forward pass")


class Population(Residency):
    r"""Low-rank noise is applied to activations: x (W + c A B')' = x W' + c (x B) A', so that k points share the products with W.

    That is how EGGROLL evaluates populations (arXiv 2511.16652). What is no matrix (biases, norms) has k values of its own size. Losses are
    those of perturbed weights to float rounding; in 16 bits it is activations that are rounded, and not weights. The activations of all k
    points are in memory at once.

    `at` shows one point in the same way. ValueError for noise that has no factors, and without the module.
    """

    name = "batched"

    def __init__(self, module: nn.Module | None, trained: Sequence[Trained], noise: Noise, members: int | None = None) -> None:
        super().__init__(module, trained, noise)
        self.members = members
        if not isinstance(noise, Shaped) or not noise.factored:
            raise ValueError(f"{noise.text!r} has no factors.")
        self._places = places_of(module, self.trained, _OTHERWISE)
        self._recurrent = any(isinstance(place.owner, nn.RNNBase) for place in self._places)
        self._shaped = noise
        self._turns = Turns()
        self._probed = False
        self._used = self._factored = False
        """Whether values of factored weights were asked for, and whether there are any."""

    def needs_probe(self) -> bool:
        """Once: which buffers evaluations move is known from then on, and no others are copied for each point."""
        first, self._probed = not self._probed, True
        return first

    @contextmanager
    def session(self) -> Iterator[None]:
        self._used = False
        yield

    def reached(self) -> bool:
        return self._used or not self._factored

    @contextmanager
    def still(self) -> Iterator[None]:
        with self._turns.turn():
            yield

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        with self._turns.turn(), uncompiled(self.trained), in_parts(self._recurrent, attention=False):
            values = {}
            for stack in self.stacks([point], eps):
                own = [t if i in stack.shared else t[0] for i, t in enumerate(stack.tensors)]
                values[stack.parameter] = stack.made(*own)
            places = [place for place in self._places if place.parameter in values]
            with shown_instead(places, values), Read(values, missing="perturbation", otherwise=_OTHERWISE):
                yield

    @contextmanager
    def together(self, points: Sequence[Displacement], eps: Sequence[float]) -> Iterator[list[Stack]]:
        """Inside it, which no reader of weights interrupts, an evaluation may show the values of all points at once."""
        with self._turns.turn():
            yield self.stacks(points, eps)

    def stacks(self, points: Sequence[Displacement], eps: Sequence[float]) -> list[Stack]:
        """The values at k points of every parameter that is displaced. ValueError for a mask that would leave parts of a matrix out."""
        terms = _Terms(points)
        moving = self.moving(self.trained) if terms.seeds else []
        places = [Place(p.key, torch.Size(p.shape), p.tensor.device) for p in moving]
        self._shaped.prepare(terms.seeds, places)
        return [self._stack(p, place, terms, eps_of(p, eps)) for p, place in zip(moving, places, strict=True)]

    def _stack(self, p: Trained, place: Place, terms: _Terms, eps: float) -> Stack:
        base = p.tensor.detach()
        factors = [found for seed in terms.seeds if (found := self._shaped.factors(seed, place)) is not None]
        if not factors:
            return Stack(p, [self._values(p, place, terms, eps)], _itself)
        if self.mask_of(p) is not None:
            raise ValueError(
                f'Invalid mask: it trains some elements of {p.name!r}, and with weights="batched" noise has whole matrices. Use a mask of '
                'whole parameters (its frozen=), or weights="exact".'
            )
        lefts, rights = (list(side) for side in zip(*factors, strict=True))
        left = torch.cat(terms.scaled(torch.stack(lefts), eps), -1).to(base.dtype)
        shared = terms.most == 1 and all(right.data_ptr() == rights[0].data_ptr() for right in rights)
        right = rights[0] if shared else torch.cat(terms.each(torch.stack(rights)), -1)
        self._factored = True
        made = partial(Factored.of, base, used=self._was_used)
        return Stack(p, [left, right.to(base.dtype)], made, frozenset([1] if shared else []))

    def _values(self, p: Trained, place: Place, terms: _Terms, eps: float) -> Tensor:
        """(k, *shape) of what is no matrix, rounded as it is on scratch: both sides alike."""
        base, mask = p.tensor.detach().reshape(-1), self.mask_of(p)
        z = torch.stack([self._shaped.values(seed, place, range(p.numel)) for seed in terms.seeds]).to(compute_dtype(base.dtype))
        total, *more = terms.scaled(z, eps)
        for scaled in more:
            total.add_(scaled)
        dithered = None
        if rounds(base.dtype):
            streams = torch.tensor([stream(seed, p.key, b"zo.round") for seed in terms.rounding], dtype=torch.int32).to(base.device)
            dithered = dither(streams, [Stretch(row, 0, p.numel) for row in range(len(total))]).view(total.shape)
        keep = None if mask is None else mask.keep(base, 0)
        shown = moved(base.expand_as(total), 1.0, total, dithered, keep, fused=False)
        return shown.to(base.dtype).view(len(total), *p.tensor.shape)

    def _was_used(self) -> None:
        self._used = True


class _Terms:
    """k points as `most` terms each, of which some are 0."""

    def __init__(self, points: Sequence[Displacement]) -> None:
        self.seeds = list(dict.fromkeys(seed for point in points for seed, _ in point))
        self.most = max(1, *map(len, points)) if points else 1
        self.rounding = [point[0][0] if point else 0 for point in points]
        """The seed that a point's weights are rounded with, the same for both sides."""
        at = {seed: i for i, seed in enumerate(self.seeds)}
        padded = [[(at[seed], multiple) for seed, multiple in point] + [(0, 0.0)] * (self.most - len(point)) for point in points]
        self._index = [torch.tensor([point[t][0] for point in padded]) for t in range(self.most)]
        self._multiples = [torch.tensor([point[t][1] for point in padded], dtype=torch.float64) for t in range(self.most)]

    def each(self, of_seeds: Tensor) -> list[Tensor]:
        """Of what every seed has, (seeds, ...), that of the points, (k, ...), for each of the terms."""
        return [of_seeds[index.to(of_seeds.device)] for index in self._index]

    def scaled(self, of_seeds: Tensor, eps: float) -> list[Tensor]:
        """The same, times multiple and eps."""
        sizes = [(multiples * eps).to(of_seeds) for multiples in self._multiples]
        rows = self.each(of_seeds)
        return [row.mul_(size.view(-1, *[1] * (row.dim() - 1))) for row, size in zip(rows, sizes, strict=True)]


def _itself(value: Tensor) -> Tensor:
    return value
