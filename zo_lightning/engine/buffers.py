"""Buffers advance once a step: each evaluation starts from the same buffers, and they end as the first one left them."""

from __future__ import annotations

from torch import Tensor, nn


class Buffers:
    """The buffers of a module that an evaluation changes (BatchNorm's running statistics and the like).

    The first step copies all buffers; from then on only those that were seen to change, so that large constant ones (causal masks) cost
    nothing. Buffers that are replaced by assignment are put back by reference.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._changing: set[tuple[int, str]] | None = None
        self._start: dict[tuple[int, str], tuple[nn.Module, str, Tensor, int, Tensor | None]] = {}
        self._after: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}

    def begin(self) -> None:
        """Remember the state before the first evaluation."""
        self._start, self._after = {}, {}
        for place, owner, name, buffer in self._all():
            keep = self._changing is None or place in self._changing
            self._start[place] = (owner, name, buffer, buffer._version, buffer.clone() if keep else None)

    def first_done(self) -> None:
        """Remember the state that the first evaluation left: the one that stays."""
        changing = set() if self._changing is None else self._changing
        for place, _owner, _name, buffer in self._all():
            before = self._start.get(place)
            if before is None or before[2] is not buffer or before[3] != buffer._version:
                self._after[place] = (buffer, buffer.clone())
                changing.add(place)
        self._changing = changing

    def rewind(self) -> None:
        """Back to the state before the first evaluation."""
        for place in self._after:
            if place in self._start:
                owner, name, buffer, _, copy = self._start[place]
                owner._buffers[name] = buffer
                if copy is not None:
                    buffer.copy_(copy)

    def finish(self) -> None:
        """To the state after the first evaluation; to the state before it where it never ended."""
        self.rewind()
        for place, (buffer, copy) in self._after.items():
            if place in self._start and copy is not None:
                owner, name = self._start[place][:2]
                owner._buffers[name] = buffer
                buffer.copy_(copy)
        self._start, self._after = {}, {}

    def _all(self) -> list[tuple[tuple[int, str], nn.Module, str, Tensor]]:
        if self._module is None:
            return []
        return [
            ((id(owner), name), owner, name, buffer)
            for owner in self._module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]
