"""Buffers advance once a step: each evaluation starts from the same buffers, and they end as the first one left them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from zo_lightning.engine.places import Bound, Place, Written


@dataclass
class _Kept:
    """One buffer: where it lives, and its value before and after the first evaluation where these are kept."""

    owner: nn.Module
    name: str
    buffer: Tensor
    version: int
    before: Tensor | None
    after: Tensor | None = None
    replaced_by: Tensor | None = None


class Buffers:
    """The buffers of a module that an evaluation changes (BatchNorm's running statistics and the like).

    The first step copies all buffers and compares values, because native kernels write running statistics without counting a version. From
    then on only those that changed are copied, and those of normalization layers, so that large constant ones (causal masks) cost nothing.
    Buffers that are replaced by assignment are put back by reference.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._changing: set[tuple[int, str]] | None = None
        self._kept: dict[tuple[int, str], _Kept] = {}
        self.moved = False
        """Whether the last first evaluation changed any."""

    def begin(self) -> None:
        """Remember the state before the first evaluation."""
        self._kept = {}
        for owner in _with_buffers(self._module):
            for name, buffer in owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    place = (id(owner), name)
                    copy = self._changing is None or place in self._changing or isinstance(owner, _NormBase)
                    self._kept[place] = _Kept(owner, name, buffer, buffer._version, buffer.clone() if copy else None)

    def first_done(self) -> None:
        """Remember the state that the first evaluation left: the one that stays."""
        changing = set() if self._changing is None else self._changing
        for place, kept in self._kept.items():
            now = kept.owner._buffers.get(kept.name)
            kept.replaced_by = now if now is not kept.buffer else None
            if kept.replaced_by is not None or self._changed(kept):
                kept.after = None if now is None else now.clone()
                changing.add(place)
        self._changing = changing
        self.moved = any(kept.after is not None or kept.replaced_by is not None for kept in self._kept.values())

    @staticmethod
    def _changed(kept: _Kept) -> bool:
        if kept.before is None:
            return kept.buffer._version != kept.version
        return not torch.equal(kept.before, kept.buffer)

    def _may_change(self) -> list[_Kept]:
        known = self._changing
        return [k for place, k in self._kept.items() if known is None or place in known or isinstance(k.owner, _NormBase)]

    def moving(self) -> list[tuple[nn.Module, str]]:
        """Where the buffers are that evaluations change, for evaluations that are one."""
        return [(kept.owner, kept.name) for kept in self._may_change()]

    def places(self) -> list[Place]:
        """The buffers that evaluations change, for evaluations that take turns: each has its own."""
        changing = self._may_change()
        tables = {id(kept.owner): Bound(kept.owner._buffers) for kept in changing}
        return [*tables.values(), *(Written(kept.buffer) for kept in changing)]

    def rewind(self) -> None:
        """Back to the state before the first evaluation."""
        for kept in self._kept.values():
            if kept.owner._buffers.get(kept.name) is not kept.buffer:
                kept.owner._buffers[kept.name] = kept.buffer
            if kept.before is not None:
                kept.buffer.copy_(kept.before)

    def finish(self) -> None:
        """To the state after the first evaluation; to the state before it where it never ended."""
        self.rewind()
        for kept in self._kept.values():
            if kept.after is None:
                continue
            target = kept.buffer if kept.replaced_by is None else kept.replaced_by
            target.copy_(kept.after)
            kept.owner._buffers[kept.name] = target
        self._kept = {}


def _with_buffers(root: nn.Module | None) -> Iterator[nn.Module]:
    """All modules that have any, each once, without the names that `root.modules()` makes on the way: this runs at every step."""
    seen, found = set[int](), [root]
    for module in found:  # which grows meanwhile
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.extend(module._modules.values())
            if module._buffers:
                yield module
