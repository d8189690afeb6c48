"""The bytes of weights, scratch and blocks as the engine itself arranges them, of a model that has no values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from mmap import PAGESIZE
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zo_lightning.engine.noise import Rademacher, joins
from zo_lightning.engine.offload.parcels import FROZEN, Parcel, parcels_among
from zo_lightning.engine.parameters import Trained, names_of, total_bytes
from zo_lightning.engine.residency.masters import has_master
from zo_lightning.engine.residency.memory import Scratch
from zo_lightning.engine.residency.units import Unit, rows_read, together, units_of, vectors_of
from zo_lightning.engine.seeds import parameter_key
from zo_lightning.planning.forward import Stretch


class Weights:
    """What of a model is trained (what requires gradients) and only read, and the units and parcels of the engine.

    Raises ValueError for a model in which nothing is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        names = names_of(module)
        every = [
            Trained(names[id(p)], parameter_key(names[id(p)]), p, 0 if p.requires_grad and p.is_floating_point() else FROZEN, (p,))
            for p in module.parameters()
        ]
        self.trained = [p for p in every if p.group != FROZEN]
        if not self.trained:
            raise ValueError(f"Nothing in {type(module).__name__} is trained: no floating-point parameter has requires_grad=True.")
        self.nbytes = total_bytes(p.tensor for p in every)
        self.buffers = total_bytes(module.buffers())
        self.masters = sum(4 * p.tensor.numel() for p in self.trained if has_master(p.tensor))
        """Of the float32 copies of 16-bit vectors."""
        self.units = units_of(module, self.trained)
        self._vectors = vectors_of(self.units)
        self.holders = parcels_among(module, self.trained, [p for p in every if p.group == FROZEN])
        self.parcels = list(dict.fromkeys(parcel for parcels in self.holders.values() for parcel in parcels))
        self.streamed = sum(p.tensor.nbytes for parcel in self.parcels for p in parcel.tensors)
        self.watched = list(dict.fromkeys([*(unit.module for unit in self.units if unit.module), *(m for m in self.holders if m)]))

    def scratch(self) -> int:
        """Bytes that "exact" allocates: the largest unit, and all vectors."""
        return _taken(together(self.units, without=self._vectors), self._vectors)

    def touched(self, inputs: Any) -> int:
        """Bytes of that scratch that are ever written, which is what counts on a CPU: of embeddings only rows of the batch."""
        whole = together(self.units, without=self._vectors)
        ids = max((t for t in tree_leaves(inputs) if _counts(t)), key=Tensor.numel, default=None)
        sizes = [self._written(unit, some, ids) for unit, some in zip(self.units, whole, strict=True)]
        return max(sizes, default=0) + _taken([], self._vectors)

    def _written(self, unit: Unit, parameters: Sequence[Trained], ids: Tensor | None) -> int:
        rows = None if ids is None else rows_read(unit, (ids,))
        if rows is not None and len(parameters) == 1:
            table = parameters[0].tensor
            return rows.numel() * (table.nbytes // table.shape[0])
        return _taken([parameters], [])

    def copied(self, kernels: bool) -> int:
        """Bytes of scratch that "copy" allocates: all that is trained; twice where `kernels` write a point and its opposite in one pass."""
        return _taken([self.trained], []) * (1 + (kernels and joins([p.tensor for p in self.trained], Rademacher())))

    def resident(self) -> int:
        """Bytes of weights that Offload never moves: vectors, and adapters."""
        return self.nbytes - self.streamed

    def slots(self) -> int:
        """Bytes of files: whole pages and one for a stamp each, one spare slot of each size included."""
        sizes = [(-(-parcel.nbytes // PAGESIZE) + 1) * PAGESIZE for parcel in self.parcels]
        return sum(sizes) + sum(set(sizes))

    @staticmethod
    def moves(parcel: Parcel) -> bool:
        """Whether steps change anything in it."""
        return any(p.group != FROZEN for p in parcel.tensors)

    def used(self, modules: Iterable[nn.Module | None]) -> list[Parcel]:
        """The parcels that are in memory while these modules run."""
        return list(dict.fromkeys(parcel for module in [None, *modules] for parcel in self.holders.get(module, ())))

    def read(self, stretches: Sequence[Stretch]) -> int:
        """Bytes of parcels that one forward pass asks for: a parcel counts each time that it comes into use."""
        before: set[Parcel] = set()
        found = 0
        for stretch in stretches:
            now = set(self.used(stretch.running))
            found += sum(parcel.nbytes for parcel in now - before)
            before = now
        return found

    def written(self, stretches: Sequence[Stretch]) -> int:
        """Bytes of parcels that one step writes back: those in use in a forward pass that steps change."""
        ran = {parcel for stretch in stretches for parcel in self.used(stretch.running)}
        return sum(parcel.nbytes for parcel in ran if self.moves(parcel))


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex()


def _taken(stack: Sequence[Sequence[Trained]], beside: Sequence[Trained]) -> int:
    """What the engine's scratch has after weights (on the meta device, so that nothing is allocated) were on it."""
    scratch = Scratch(stack)
    for parameters in stack:
        scratch.take(parameters)[1]()
    scratch.take(beside, beside=True)[1]()
    return scratch.nbytes()
