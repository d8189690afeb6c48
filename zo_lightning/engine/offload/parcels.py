"""What is stored and moved together: the large tensors of a block, trained and frozen, one behind another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zo_lightning.engine.parameters import Trained, total_bytes
from zo_lightning.engine.residency.memory import dense, like
from zo_lightning.engine.residency.units import units_of
from zo_lightning.engine.seeds import parameter_key

ALIGN = 64
"""Bytes between the beginnings of two tensors: matrix kernels may round differently on memory that is not aligned."""
FROZEN = -1
"""The group of a tensor that is only read."""


@dataclass(eq=False)
class Parcel:
    """Tensors at fixed offsets of one stretch of bytes."""

    name: str
    tensors: list[Trained]
    offsets: list[int]
    nbytes: int

    @staticmethod
    def of(name: str, tensors: Sequence[Trained]) -> Parcel:
        """The tensors in their order."""
        offsets, end = [], 0
        for p in tensors:
            offsets.append(end)
            end += -(-p.tensor.nbytes // ALIGN) * ALIGN
        return Parcel(name, list(tensors), offsets, end)

    def views(self, stretch: Callable[[int, int], Tensor]) -> list[Tensor]:
        """The tensors with their shapes, dtypes and strides; `stretch(begin, end)` gives the memory of these bytes."""
        ends = [offset + p.tensor.nbytes for p, offset in zip(self.tensors, self.offsets, strict=True)]
        return [like(p.tensor, stretch(*span).view(p.tensor.dtype)) for p, *span in zip(self.tensors, self.offsets, ends, strict=True)]

    def renew(self, trained: Sequence[Trained]) -> None:
        """Other tensors are trained now."""
        known = {id(alias): p for p in trained for alias in p.aliases}
        self.tensors = [known.get(id(p.tensor)) or replace(p, group=FROZEN) for p in self.tensors]


def parcels_of(module: nn.Module, trained: Sequence[Trained], names: dict[int, str]) -> dict[nn.Module | None, list[Parcel]]:
    """For each block, and each module outside of blocks that owns matrices, the parcels that it needs: one of its own matrices that steps
    change, one of those that they only read, and one for each that it shares with another. Under None those that no module owns.

    Vectors stay where they are: they are some thousandths of a model, and read at every step. So do adapters, all that is trained where
    that is less than a twentieth of the model.
    """
    return parcels_among(module, trained, _frozen(module, trained, names))


def parcels_among(module: nn.Module, trained: Sequence[Trained], frozen: Sequence[Trained]) -> dict[nn.Module | None, list[Parcel]]:
    """The same, told which weights are only read; none of them needs to have values."""
    few = 20 * total_bytes(p.tensor for p in trained) <= total_bytes(p.tensor for p in [*trained, *frozen])
    every = [*([] if few else trained), *frozen]
    large = [p for p in every if p.tensor.dim() > 1 and p.tensor.numel() and dense(p.tensor)]
    units = units_of(module, large)
    owners: dict[int, int] = {}
    for unit in units:
        for p in unit.parameters:
            owners[id(p)] = owners.get(id(p), 0) + 1
    shared = {id(p): Parcel.of(p.name, [p]) for p in large if owners[id(p)] > 1}
    found: dict[nn.Module | None, list[Parcel]] = {}
    for unit in units:
        own = [p for p in unit.parameters if id(p) not in shared]
        kinds = [[p for p in own if (p.group == FROZEN) is still] for still in (False, True)]
        found[unit.module] = [Parcel.of(some[0].name, some) for some in kinds if some]
        found[unit.module] += [shared[id(p)] for p in unit.parameters if id(p) in shared]
    return found


def _frozen(module: nn.Module, trained: Sequence[Trained], names: dict[int, str]) -> list[Trained]:
    """The parameters that no step changes; those that share memory count once."""
    known = {id(alias) for p in trained for alias in p.aliases}
    found: dict[tuple[object, ...], list[Tensor]] = {}
    for parameter in module.parameters():
        plain = type(parameter.data) is Tensor and parameter.layout == torch.strided and not parameter.is_meta
        if id(parameter) not in known and plain and parameter.numel():
            place = (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype)
            found.setdefault(place, []).append(parameter)
    return [Trained(name := names[id(aliases[0])], parameter_key(name), aliases[0], FROZEN, tuple(aliases)) for aliases in found.values()]
