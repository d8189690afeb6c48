"""Which weights to train: each rule is a small class with its equation and paper."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.masks.select import band, lot
from zo_lightning.engine.messages import check_count
from zo_lightning.engine.noise.members import Bits, Listed, Members
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.shards import is_sharded, whole

LIST_BELOW = 0.02
"""Below this density a layer's mask is a list of its elements, fixed until the next refresh, so that cost follows what is trained."""


class Layer(NamedTuple):
    """One trained tensor, as a rule sees it: canonical name, parameter key, the unperturbed parameter, number of its group.

    What is measured of a `Scale` is the gradient with respect to theta / unit, so its noise has the size 1 and no bound here.
    """

    name: str
    key: int
    tensor: Tensor
    group: int = 0
    unit: float = 1.0
    least: float | None = None
    region: None = None

    @property
    def block(self) -> str | None:
        """The repeated block that it is in; None outside of blocks."""
        return block_of(self.name)


class ShardedLayer(Layer):
    """A layer of which this process has a part: `tensor` is gathered when a rule looks at it, by all ranks alike, and kept by nobody."""

    __slots__ = ()

    @property
    def tensor(self) -> Tensor:
        """The whole parameter."""
        part, like = self[2]
        return whole(part, like)

    @staticmethod
    def of(p: Trained) -> Layer:
        """The layer of a trained parameter."""
        if not is_sharded(p.aliases[0]):
            return Layer(p.name, p.key, p.tensor, p.group)
        return ShardedLayer(p.name, p.key, (p.tensor.detach(), p.aliases[0]), p.group)  # type: ignore[arg-type]


def block_of(name: str) -> str | None:
    """Of "model.layers.3.norm.weight" the repeated block "model.layers.3": the name up to the first number; None where there is none."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def _no_estimate(layer: Layer) -> Tensor:
    raise ValueError(f"No step has measured a gradient of {layer.name!r}: the rule has measures = 0.")


class Draw(NamedTuple):
    """What a mask is made from beside the weights: the seed of the run, the number of the mask, which counts refreshes from 0, and what
    was measured before it.

    `gradient(layer)` is the mean estimate of its gradient over the steps that measured (`MaskRule.measures`): float32, flat.
    """

    seed: int
    number: int
    gradient: Callable[[Layer], Tensor] = _no_estimate

    def random(self, label: str) -> random.Random:
        """A generator of its own for each (seed, number, label)."""
        return random.Random(f"{self.seed}.{self.number}.{label}")


Chosen = dict[int, Members | None]
"""By parameter key: the mask, None for the whole tensor; tensors that are not in it rest."""


class MaskRule(ABC):
    """Chooses among the layers, by names, unperturbed weights, the counts asked for, and the draw."""

    name: str
    has_density = True
    """Whether a density is asked for; other rules have one of their own."""
    reproducible = True
    """Whether the mask follows from the weights, the names and the draw, so that a step log need not keep it."""

    @property
    def measures(self) -> int:
        """Steps at the beginning of each refresh period that perturb every layer the rule is for, and move nothing."""
        return 0

    @abstractmethod
    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        """`counts` says how many elements of each layer (by key) are asked for, from 0 to all of them."""


class ByLayer(MaskRule):
    """A rule that chooses within each layer on its own."""

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        chosen: Chosen = {}
        for layer in layers:
            count = counts[layer.key]
            if count == layer.tensor.numel():
                chosen[layer.key] = None
            elif count:
                chosen[layer.key] = self.of_layer(layer, count, draw)
        return chosen

    @abstractmethod
    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        """`count` elements of a layer, at least one and not all."""


def listed(members: Members, tensor: Tensor, count: int) -> Members:
    """`members`, or the list of them where they are few."""
    if count >= LIST_BELOW * tensor.numel():
        return members
    flat, found = tensor.detach().reshape(-1), []
    for start in range(0, flat.numel(), 1 << 19):
        piece = flat[start : start + (1 << 19)]
        found.append(torch.nonzero(members.keep(piece, start)).reshape(-1) + start)
    return Listed(torch.cat(found))


def stored(members: Members, tensor: Tensor, count: int) -> Members:
    """What `members` are at these weights, as a list or as bits: fixed until the next refresh."""
    few = listed(members, tensor, count)
    return few if isinstance(few, Listed) else Bits.taken(members, tensor.detach())


def following(tensor: Tensor, count: int, largest: bool) -> Members:
    """The smallest or largest, followed by their threshold.

    Where more than a quarter of them equal it (the zeros of a new adapter, the ones of a norm), the first update would take them to either
    side of it; then they are kept until the next refresh.
    """
    mask = band(tensor, count, largest)
    pieces = tensor.detach().reshape(-1).split(1 << 20)
    beyond = sum(int(((piece.abs() > mask.bound) if largest else (piece.abs() < mask.bound)).sum()) for piece in pieces)
    return (stored if 4 * (count - beyond) > count else listed)(mask, tensor, count)


@dataclass(frozen=True)
class SmallWeights(ByLayer):
    """m[i] = 1[|theta[i]| <= t], with t the layer's percentile of the density: Sparse MeZO (arXiv 2402.15751).

    The paper trains all layers, biases and norms too, at sparsity 0.5 to 0.8 (density 0.2 to 0.5), with a higher learning rate. The
    threshold is stored and refreshed; membership follows the weights at every step, but where many equal the threshold (`following`).
    """

    name = "small_weights"

    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        return following(layer.tensor, count, largest=False)


@dataclass(frozen=True)
class LargeWeights(ByLayer):
    """m[i] = 1[|theta[i]| >= t]: the layer's largest weights, magnitude masks of ZO-Bench (arXiv 2402.11592)."""

    name = "large_weights"

    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        return following(layer.tensor, count, largest=True)


@dataclass(frozen=True)
class Random(ByLayer):
    """m[i] = 1[u[i] <= t], with u uniform, a function of (seed, number of the mask, parameter, element): nothing is stored.

    ZO-Bench (arXiv 2402.11592) and DeepZero (arXiv 2310.02025), which draws anew every 5 epochs.
    """

    name = "random"

    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        seed = draw.random("lot").getrandbits(63)
        return listed(lot(seed, layer.key, layer.tensor, count), layer.tensor, count)


@dataclass(frozen=True)
class NofM(MaskRule):
    """Of every m consecutive weights of a row, the n of largest (or `smallest`) absolute value: the density is n / m.

    The pattern of N:M sparsity (Mishra et al. 2021, arXiv 2104.08378), 2:4 by default. Raises ValueError where m does not divide a row.
    """

    n: int = 2
    m: int = 4
    smallest: bool = False

    name = "n_of_m"
    has_density = False

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m)
        if not isinstance(self.smallest, bool):
            raise ValueError(f"Invalid smallest: {self.smallest!r}. Must be True or False.")
        if self.n > self.m:
            raise ValueError(f"Invalid n: {self.n}. Must be at most m={self.m}.")

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        return {layer.key: self._of_layer(layer) for layer in layers}

    def _of_layer(self, layer: Layer) -> Members | None:
        row = layer.tensor.shape[-1] if layer.tensor.dim() else 1
        if row % self.m:
            raise ValueError(
                f"NofM(n={self.n}, m={self.m}): the rows of {layer.name!r} have {row} weights, which {self.m} does not divide. Use another "
                "m, or leave it out with exclude=."
            )
        if self.n == self.m:
            return None
        kept = []
        for rows in layer.tensor.detach().reshape(-1, self.m).split(1 << 18):
            order = rows.abs().argsort(dim=1, descending=not self.smallest, stable=True)
            kept.append(torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order[:, : self.n], True).reshape(-1))
        return Bits.of(torch.cat(kept))
