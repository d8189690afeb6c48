"""Rules that give every weight a score of its own: its gradient, or its size after a low-rank approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.masks.rules import ByLayer, Chosen, Draw, Layer, ShardedLayer, stored
from zo_lightning.engine.masks.select import band
from zo_lightning.engine.messages import check_count
from zo_lightning.engine.noise.members import Members
from zo_lightning.engine.randomness import host_state


def largest(layer: Layer, scores: Tensor, count: int) -> Members:
    """The `count` elements of a layer that have the largest absolute scores, among equal ones the first; stored.

    ValueError where a score is not finite.
    """
    if not scores.isfinite().all():
        raise ValueError(f"The scores of {layer.name!r}, from which its mask is made, are not all finite. Use float32 or bfloat16.")
    return stored(band(scores, count, largest=True), scores, count)


@dataclass(frozen=True)
class Sensitive(ByLayer):
    """The weights with the largest squared gradient: m[i] = 1[s[i] >= t], t the layer's percentile.

    With `losses`, s[i] = sum_b (dL_b / dtheta[i])^2 by backpropagation: `losses()` returns or yields a few differentiable losses, each on a
    batch of its own. It takes the memory of backpropagation, once a refresh. Guo et al. (arXiv 2406.02913) train the extreme 0.1 % that
    they find so: `SparseMask(Sensitive(losses), density=0.001)`.

    Without it, s[i] = (1/n sum_j g_j z_j[i])^2, the square of the forward-only estimate: each period between two refreshes begins with
    `steps` steps that perturb every layer the rule is for, and move nothing. (The mean of the squares (g_j z_j[i])^2 would say less: it is
    the same for all i where z is +-1.) E s[i] = dL/dtheta[i]^2 + |dL/dtheta|^2 / n, so that a weight stands out after some
    |dL/dtheta|^2 / (dL/dtheta[i])^2 steps: many, in a large model.
    """

    losses: Callable[[], Iterable[Tensor]] | None = None
    steps: int = 100

    name = "sensitive"
    reproducible = False

    def __post_init__(self) -> None:
        if self.losses is not None and not callable(self.losses):
            raise ValueError(f"Invalid losses: {self.losses!r}. Must be a function that returns a few differentiable losses, or None.")
        check_count("steps", self.steps, "steps that estimate the gradient")

    @property
    def measures(self) -> int:
        return self.steps if self.losses is None else 0

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        if self.losses is not None:
            squares = _squares(self.losses, [layer for layer in layers if 0 < counts[layer.key] < layer.tensor.numel()])
            draw = draw._replace(gradient=lambda layer: squares[layer.key])
        return super().choose(layers, counts, draw)

    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        return largest(layer, draw.gradient(layer).reshape(-1), count)


def _squares(losses: Callable[[], Iterable[Tensor]], layers: Sequence[Layer]) -> dict[int, Tensor]:
    """sum_b (dL_b / dtheta)^2 of each layer, by its key."""
    if not layers:
        return {}
    if isinstance(layers[0], ShardedLayer):
        raise ValueError(f"Sensitive(losses=...) differentiates, and {layers[0].name!r} is sharded. Use Sensitive(steps=...).")
    tensors = [layer.tensor for layer in layers]
    batches = 0
    with host_state({tensor.device for tensor in tensors}), torch.inference_mode(False), torch.enable_grad():
        squares = [torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in tensors]
        given = losses()
        if isinstance(given, Tensor) or not isinstance(given, Iterable):
            raise ValueError(f"Sensitive: losses() gave {_described(given)}; it must return several losses, or yield them.")
        for loss in given:
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(f"Sensitive: losses() gave {_described(loss)}; it must give scalar tensors that can be differentiated.")
            for square, gradient in zip(squares, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
                if gradient is not None:
                    square.add_(gradient.detach().float().square())
            batches += 1
    if not batches:
        raise ValueError("Sensitive: losses() gave no loss. Give one or more, each on a batch of its own.")
    if not any(square.any() for square in squares):
        raise ValueError("Sensitive: losses() depends on no trained weight. Compute it with the model that is trained, not with a copy.")
    return {layer.key: square for layer, square in zip(layers, squares, strict=True)}


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient (no_grad, or detached)'}"


@dataclass(frozen=True)
class PrincipalWeights(ByLayer):
    """m[i, j] = 1[|(U_r S_r V_r^T)[i, j]| >= t]: the largest weights of each matrix's best approximation of rank r.

    LIFT (arXiv 2506.00772), which trains the 5 % of all matrices that are so, and nothing else. The approximation is a randomized singular
    value decomposition (Halko et al. 2011, arXiv 0909.4061) with two power iterations, in float32. Tensors of more dimensions are taken
    as matrices of their first one by the rest. Vectors have no rank: `vectors="rest"` leaves them untrained, as the paper does;
    "refuse" raises ValueError where there are any.
    """

    rank: int = 128
    vectors: str = "refuse"

    name = "principal_weights"
    reproducible = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if self.vectors not in ("refuse", "rest"):
            raise ValueError(f"Invalid vectors: {self.vectors!r}. Must be 'refuse' or 'rest' (they are not trained).")

    def choose(self, layers: Sequence[Layer], counts: Mapping[int, int], draw: Draw) -> Chosen:
        vectors = [layer.name for layer in layers if layer.tensor.dim() < 2]
        if vectors and self.vectors == "refuse":
            raise ValueError(
                f"PrincipalWeights: {vectors[0]!r} is a vector, which has no low-rank approximation; {len(vectors)} of {len(layers)} "
                "layers are. Use PrincipalWeights(vectors='rest') to leave vectors untrained, as LIFT does, or name them in exclude= "
                "(trained in full) or frozen=."
            )
        return super().choose([layer for layer in layers if layer.tensor.dim() > 1], counts, draw)

    def of_layer(self, layer: Layer, count: int, draw: Draw) -> Members:
        return largest(layer, self._approximation(layer, draw).reshape(-1), count)

    def _approximation(self, layer: Layer, draw: Draw) -> Tensor:
        matrix = layer.tensor.detach().flatten(1).float()
        least = min(matrix.shape)
        if self.rank >= least:
            return matrix
        with host_state({matrix.device}) as state, torch.autocast(matrix.device.type, enabled=False):
            state.seed(draw.random(layer.name).getrandbits(63))
            u, s, v = torch.svd_lowrank(matrix, q=min(least, self.rank + 8), niter=2)
            return (u[:, : self.rank] * s[: self.rank]) @ v[:, : self.rank].t()
