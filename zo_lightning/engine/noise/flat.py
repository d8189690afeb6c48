"""Small tensors as one flat tensor: their noise, their arithmetic and their rounding in a few operations for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Drawn, Noise, Stretch
from zo_lightning.engine.noise.rounding import dither, fused_stochastic, stochastic


class Small:
    """Tensors of one dtype and device, in an order; their elements follow each other in the logical order of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.lengths = [tensor.numel() for tensor in self.tensors]
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32

    def gather(self) -> Tensor:
        """Their values, in a new tensor."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors])

    def spread(self, scalars: Sequence[float]) -> float | Tensor:
        """One number a tensor, as one number where they agree, else for every element."""
        if all(scalar == scalars[0] for scalar in scalars):
            return scalars[0]
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.tensor(scalars, dtype=torch.float64).to(self.device).repeat_interleave(lengths)

    def scatter(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        """Write the values into tensors of these shapes."""
        for out, piece in zip(outs, values.split(self.lengths), strict=True):
            out.copy_(piece.view(out.shape))


def step_flat(
    small: Small,
    base: Tensor,
    decay: float | Tensor,
    coefficients: Sequence[float | Tensor],
    keys: Sequence[Drawn],
    noise: Noise,
    fused: bool,
) -> Tensor:
    """decay * base + sum_j c_j z_j for the flat values `base`; rounded to their dtype where the keys say stochastically, else wider."""
    table = keys[0].table
    total = torch.zeros((), dtype=small.compute, device=small.device)
    for j, c in enumerate(coefficients):
        z = noise.values(table, _whole(small, keys, j), torch.float32, fused)
        scaled = z.to(small.compute) * _cast(c, small.compute)
        total = scaled if j == 0 else total.add_(scaled)
    wide = base.to(small.compute)
    if not keys[0].rounded:
        return (wide * _cast(decay, small.compute)).add_(total)
    dithered = dither(table, _whole(small, keys, keys[0].terms), fused)
    rounded = fused_stochastic if fused else stochastic
    result: Tensor = rounded(wide, wide * _cast(decay - 1.0, small.compute) + total, dithered, small.dtype)
    return result


def _whole(small: Small, keys: Sequence[Drawn], term: int) -> list[Stretch]:
    return [drawn.stretch(term, 0, length) for drawn, length in zip(keys, small.lengths, strict=True)]


def _cast(scalar: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar
