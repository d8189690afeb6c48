"""Rules that choose whole parts of a model: modules, blocks, rows and columns; and the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zo_lightning.engine.masks.rules import Chosen, Draw, Layer, MaskRule, listed
from zo_lightning.engine.masks.select import band
from zo_lightning.engine.messages import check_count
from zo_lightning.engine.noise.members import Bits, Members

OUTLIER = 5.0
"""An outlier weight is this many times the mean absolute weight of its tensor: the M of OWL (arXiv 2310.05175)."""


def blocks_of(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers of each repeated block, in their order. ValueError where there are fewer than two blocks."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.block is not None:
            blocks.setdefault(layer.block, []).append(layer)
    if len(blocks) < 2:
        names = ", ".join(repr(layer.name) for layer in layers[:4])
        raise ValueError(f"No repeated blocks are trained here (names with a number, such as 'layers.0.weight'); there are {names}, ...")
    return blocks


@dataclass(frozen=True)
class HalfLayers(MaskRule):
    """Half of each block's modules that have matrices, and half of those that have only vectors (norms); drawn anew at each refresh.

    HFT (arXiv 2404.18466) for fine-tuning. Of an odd number one more or one less is trained, in turns from block to block. What is
    outside of blocks is trained.
    """

    name = "half_layers"
    has_density = False

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        blocks = blocks_of(layers)
        chosen: Chosen = {layer.key: None for layer in layers if layer.block is None}
        for number, block in enumerate(blocks):
            owners: dict[str, list[Layer]] = {}
            for layer in blocks[block]:
                owners.setdefault(layer.name.rpartition(".")[0], []).append(layer)
            for kind in (True, False):
                own = [name for name, parts in owners.items() if any(p.tensor.dim() > 1 for p in parts) is kind]
                half = (len(own) + (number + draw.number) % 2) // 2
                for name in draw.random(f"{block}.{kind}").sample(own, half):
                    chosen.update((layer.key, None) for layer in owners[name])
        return chosen


@dataclass(frozen=True)
class LayerSampling(MaskRule):
    """`layers` blocks at a time, drawn anew at each refresh, without replacement; what is outside of blocks is trained always.

    LISA (arXiv 2403.17919) draws uniformly, and trains the embedding and the head always; OwLore (arXiv 2405.18380) draws blocks with
    more outliers more often: `by="outliers"`, the share of weights with |theta| > 5 mean |theta|. `weights` gives each block's own, in
    order.
    """

    layers: int = 2
    by: str = "uniform"
    weights: Sequence[float] | None = None

    name = "layer_sampling"
    has_density = False

    def __post_init__(self) -> None:
        check_count("layers", self.layers, "blocks that are trained at a time")
        if self.by not in ("uniform", "outliers"):
            raise ValueError(f"Invalid by: {self.by!r}. Must be 'uniform' or 'outliers', or give weights=.")
        if self.weights is not None:
            if self.by != "uniform":
                raise ValueError(f"by={self.by!r} does nothing where weights= are given. Leave one of them out.")
            object.__setattr__(self, "weights", _numbers(self.weights))

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        blocks = blocks_of(layers)
        weights = self._weights(blocks)
        if self.layers > sum(weight > 0 for weight in weights):
            raise ValueError(f"Invalid layers: {self.layers}. There are {len(blocks)} blocks, {sum(w > 0 for w in weights)} of weight > 0.")
        chance = draw.random("blocks")
        rank = {}  # log u / w: the largest are a draw without replacement by weight (Efraimidis and Spirakis 2006)
        for block, weight in zip(blocks, weights, strict=True):
            u = 1.0 - chance.random()
            rank[block] = math.log(u) / weight if weight > 0 else -math.inf
        drawn = sorted(rank, key=rank.__getitem__, reverse=True)[: self.layers]
        return {layer.key: None for layer in layers if layer.block is None or layer.block in drawn}

    def _weights(self, blocks: Mapping[str, Sequence[Layer]]) -> list[float]:
        if self.weights is not None:
            if len(self.weights) != len(blocks):
                raise ValueError(f"Invalid weights: there are {len(self.weights)}, and {len(blocks)} blocks.")
            return list(self.weights)
        if self.by == "uniform":
            return [1.0] * len(blocks)
        return [_outliers([layer.tensor for layer in block]) + 1e-12 for block in blocks.values()]


def _numbers(weights: object) -> tuple[float, ...]:
    good = isinstance(weights, Sequence) and all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights)
    if not good or not any(weights):  # type: ignore[arg-type]
        raise ValueError(f"Invalid weights: {weights!r}. Must be a sequence of numbers that are finite, >= 0 and not all 0.")
    return tuple(float(w) for w in weights)  # type: ignore[attr-defined]


def _outliers(tensors: Sequence[Tensor]) -> float:
    """The share of weights of matrices that are outliers."""
    many = few = 0
    for tensor in tensors:
        if tensor.dim() > 1 and tensor.numel():
            size = tensor.detach().abs().float()
            few, many = few + int((size > OUTLIER * size.mean()).sum()), many + tensor.numel()
    return few / max(1, many)


@dataclass(frozen=True)
class Blockwise(MaskRule):
    """One block after another, `blocks` at a time; what is outside of blocks is the last one: block coordinate descent of ZO-Bench.

    arXiv 2402.11592, section on block-wise ZO; each refresh goes on to the next blocks.
    """

    blocks: int = 1

    name = "blockwise"
    has_density = False

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks, "blocks that are trained at a time")

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        parts = list(blocks_of(layers).values())
        outside = [layer for layer in layers if layer.block is None]
        parts += [outside] if outside else []
        first = draw.number * self.blocks
        taken = [parts[(first + i) % len(parts)] for i in range(min(self.blocks, len(parts)))]
        return {layer.key: None for part in taken for layer in part}


@dataclass(frozen=True)
class Structured(MaskRule):
    """Whole rows (output channels) or columns (input channels) of matrices, `group` neighbours together: heads have group = their size.

    S2FT (arXiv 2412.06289) trains a few heads and channels, of the output and down projections, which is axis "columns". They are chosen
    by chance, or by their norm: `by` is "random", "large" or "small". Of a layer with g groups, round(density g) are trained, at least
    one. A bias goes with the rows of its matrix; other vectors rest.
    """

    axis: str = "rows"
    group: int = 1
    by: str = "random"

    name = "structured"

    def __post_init__(self) -> None:
        if self.axis not in ("rows", "columns"):
            raise ValueError(f"Invalid axis: {self.axis!r}. Must be 'rows' or 'columns'.")
        if self.by not in ("random", "large", "small"):
            raise ValueError(f"Invalid by: {self.by!r}. Must be 'random', 'large' or 'small'.")
        check_count("group", self.group, "the size of a head, or 1")

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        chosen: Chosen = {}
        lines: dict[str, Tensor] = {}
        for layer in layers:
            if layer.tensor.dim() > 1 and counts[layer.key]:
                kept = self._lines(layer, counts[layer.key] / layer.tensor.numel(), draw)
                lines[layer.name.rpartition(".")[0]] = kept
                whole = kept[:, None] if self.axis == "rows" else kept[None, :]
                chosen[layer.key] = _stored(whole.expand(layer.tensor.shape[0], layer.tensor[0].numel()), layer.tensor)
        for layer in layers:
            owner = lines.get(layer.name.rpartition(".")[0])
            if layer.tensor.dim() == 1 and self.axis == "rows" and owner is not None and len(owner) == len(layer.tensor):
                chosen[layer.key] = _stored(owner, layer.tensor)
        return chosen

    def _lines(self, layer: Layer, density: float, draw: Draw) -> Tensor:
        matrix = layer.tensor.detach().flatten(1)
        matrix = matrix if self.axis == "rows" else matrix.t()
        size = len(matrix)
        if size % self.group:
            raise ValueError(
                f"Structured(group={self.group}): {layer.name!r} has {size} {self.axis}, which {self.group} does not divide. Use another "
                "group, or leave it out with exclude=."
            )
        groups = size // self.group
        count = min(groups, max(1, round(density * groups)))
        if self.by == "random":
            kept = torch.zeros(groups, dtype=torch.bool, device=matrix.device)
            kept[draw.random(layer.name).sample(range(groups), count)] = True
        else:
            norms = torch.stack([part.float().square().sum() for part in matrix.split(self.group)])
            kept = band(norms, count, largest=self.by == "large").keep(norms, 0)
        return kept.repeat_interleave(self.group)


def _stored(keep: Tensor, tensor: Tensor) -> Members | None:
    count = int(keep.sum())
    return None if count == tensor.numel() else listed(Bits.of(keep.reshape(-1)), tensor, count)


@dataclass(frozen=True)
class Where(MaskRule):
    """The user's own: `function(name, tensor)` returns a bool tensor of the tensor's shape, or True or False for all of it."""

    function: Callable[[str, Tensor], Tensor | bool] = field()

    name = "where"
    has_density = False
    reproducible = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"Invalid function: {self.function!r}. Must be a function of (name, tensor).")

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        chosen: Chosen = {}
        for layer in layers:
            keep = self.function(layer.name, layer.tensor.detach())
            if type(keep).__name__ in ("bool", "bool_"):  # numpy's, too
                keep = torch.full_like(layer.tensor, keep, dtype=torch.bool)  # type: ignore[arg-type]
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != layer.tensor.shape:
                raise ValueError(
                    f"Where: the function returned {_described(keep)} for {layer.name!r}; it must be a bool tensor of shape "
                    f"{tuple(layer.tensor.shape)}, or True or False."
                )
            if keep.any():
                chosen[layer.key] = _stored(keep.to(layer.tensor.device), layer.tensor)
        return chosen


def _described(value: object) -> str:
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
