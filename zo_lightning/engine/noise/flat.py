"""Small tensors as one flat tensor: their noise, their arithmetic and their rounding in a few operations for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from zo_lightning.engine.noise.base import Drawn, Elementwise, Stretch, compute_dtype
from zo_lightning.engine.noise.dither import dither
from zo_lightning.engine.noise.rounding import fused_stochastic, stochastic


class Small:
    """Tensors of one dtype and device, in an order; their elements follow each other in the logical order of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.lengths = [tensor.numel() for tensor in self.tensors]
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device
        self.compute = compute_dtype(self.tensors[0].dtype)

    def gather(self) -> Tensor:
        """Their values, in a new tensor."""
        flat: Tensor = _flatten_dense_tensors(self.tensors)
        return flat

    def spread(self, scalars: Sequence[float]) -> float | Tensor:
        """One number a tensor, as one number where they agree, else for every element."""
        if all(scalar == scalars[0] for scalar in scalars):
            return scalars[0]
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.tensor(scalars, dtype=torch.float64).to(self.device).repeat_interleave(lengths)

    def scatter(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        """Write the values into tensors of these shapes."""
        whole = _whole_of(outs)
        if whole is None:
            torch._foreach_copy_(list(outs), _unflatten_dense_tensors(values, self.tensors))
        else:
            whole.copy_(values)

    def both_sides(self, keys: Sequence[Drawn], coefficients: Sequence[float], noise: Elementwise) -> Tensor:
        """(base + c z, base - c z), of shape (2, elements), in one compiled pass; wide."""
        sides = [[(1.0, sign * c) for c in coefficients] for sign in (1.0, -1.0)]
        return noise.together(self.gather(), keys[0].table, _whole(self, keys, 0), sides)


def _whole_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The one-dimensional tensor of which these are the pieces, one after another; None where they are not."""
    first, end = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.storage_offset() != end or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def step_flat(
    small: Small,
    base: Tensor,
    steps: Sequence[tuple[float, Sequence[float]]],
    keys: Sequence[Drawn],
    noise: Elementwise,
    fused: bool,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """decay * base + sum_j c_j z_j for the flat values `base` and a step (decay, (c_1, ..., c_n)) of each tensor.

    Rounded to their dtype where the keys say stochastically, else wider. Outside keep(base) it is `base`.
    """
    table, terms = keys[0].table, keys[0].terms
    decays = [decay for decay, _ in steps]
    whole = all(drawn.region is None for drawn in keys)
    if fused and whole and terms == 1 and not keys[0].rounded and keep is None and noise.joins(small.lengths):
        return noise.together(base, table, _whole(small, keys, 0), [[(decay, c[0]) for decay, c in steps]])[0]
    drawn = (noise.values(table, _whole(small, keys, j), torch.float32, fused) for j in range(terms))
    dithered = dither(table, _whole(small, keys, terms), fused) if keys[0].rounded else None
    total = total_of(drawn, [small.spread([c[j] for _, c in steps]) for j in range(terms)], base)
    return moved(base, small.spread(decays), total, dithered, None if keep is None else keep(base), fused, small.dtype)


def total_of(drawn: Iterable[Tensor], coefficients: Sequence[float | Tensor], base: Tensor) -> Tensor:
    """sum_j c_j z_j, in the order of the terms."""
    dtype = compute_dtype(base.dtype)
    total = torch.zeros((), dtype=dtype, device=base.device)
    for j, (c, z) in enumerate(zip(coefficients, drawn, strict=True)):
        scaled = z.to(dtype) * _cast(c, dtype)
        total = scaled if j == 0 else total.add_(scaled)
    return total


def moved(
    base: Tensor,
    decay: float | Tensor,
    total: Tensor,
    dithered: Tensor | None,
    keep: Tensor | None,
    fused: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """decay * base + total, wide, or with a dither rounded to `dtype` (None: that of `base`); `base` outside `keep`."""
    compute = compute_dtype(base.dtype)
    wide = base.to(compute)
    if dithered is None:
        result = (wide * _cast(decay, compute)).add_(total)
        return result if keep is None else torch.where(keep, result, wide)
    change = wide * _cast(decay - 1.0, compute) + total
    change = change if keep is None else torch.where(keep, change, 0.0)
    rounded: Tensor = (fused_stochastic if fused else stochastic)(wide, change, dithered, base.dtype if dtype is None else dtype)
    return rounded


def _whole(small: Small, keys: Sequence[Drawn], term: int) -> list[Stretch]:
    return [stretch for drawn, length in zip(keys, small.lengths, strict=True) for stretch in drawn.whole(term, length)]


def _cast(scalar: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return scalar.to(dtype) if isinstance(scalar, Tensor) else scalar
