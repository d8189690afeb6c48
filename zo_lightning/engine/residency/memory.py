"""Scratch memory of residencies: buffers that are used again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.parameters import Trained

Place = tuple[torch.device, torch.dtype]

_ALIGN = 64
"""Bytes. Matrix kernels may round differently on unaligned memory; scratch is aligned as allocations are."""


class _Known(NamedTuple):
    """What was taken before: the same tensors are taken at every evaluation, and find the same places free."""

    forms: list[tuple[Place, torch.Size, tuple[int, ...]]]
    sizes: dict[Place, int]
    outs: dict[tuple[int, ...], list[Tensor]]
    """By the addresses where the memory of each kind begins."""


class Scratch:
    """Memory that is used again and again: a stack for units that run one after another or one inside another, and buffers beside it.

    The stack is as large as the largest of `together`, weights that are on scratch at the same time. It is on `device`; None: where the
    weights are.
    """

    def __init__(self, together: Iterable[Sequence[Trained]] = (), device: torch.device | None = None) -> None:
        self._device = device
        self._limit: dict[Place, int] = {}
        for parameters in together:
            for place, wanted in self._sizes(parameters).items():
                self._limit[place] = max(self._limit.get(place, 0), wanted)
        self._stack: dict[Place, Tensor] = {}
        self._top: Counter[Place] = Counter()
        self._taken: Counter[Place] = Counter()
        self._free: dict[tuple[Place, int], list[Tensor]] = {}
        self._known: dict[tuple[Trained, ...], _Known] = {}

    def take(self, parameters: Sequence[Trained], beside: bool = False) -> tuple[list[Tensor], Callable[[], None]]:
        """Uninitialised tensors like `parameters`, on the stack or `beside` it, and what gives their memory back."""
        together = tuple(parameters)
        forms = [(self._place(p), p.tensor.shape, p.tensor.stride()) for p in together]
        known = self._known.get(together)
        if known is None or known.forms != forms:
            known = self._known[together] = _Known(forms, self._sizes(together), {})
        parts = {place: self._reserve(place, wanted, beside) for place, wanted in known.sizes.items()}

        def give_back() -> None:
            for _, _, release in parts.values():
                release()

        starts = tuple(buffer.data_ptr() + begin * buffer.element_size() for buffer, begin, _ in parts.values())
        if starts not in known.outs:
            known.outs[starts] = self._views(together, {place: (buffer, begin) for place, (buffer, begin, _) in parts.items()})
        return known.outs[starts], give_back

    def _views(self, parameters: Sequence[Trained], parts: dict[Place, tuple[Tensor, int]]) -> list[Tensor]:
        """Tensors like `parameters`, one after another from where the (buffer, first element) of their place say."""
        at = {place: begin for place, (_, begin) in parts.items()}
        outs = []
        for p in parameters:
            tensor, place = p.tensor, self._place(p)
            begin, numel = at[place], tensor.numel()
            outs.append(like(tensor, parts[place][0][begin : begin + numel]))
            at[place] = begin + _rounded(tensor, numel)
        return outs

    def _reserve(self, place: Place, wanted: int, beside: bool) -> tuple[Tensor, int, Callable[[], None]]:
        """(buffer, index of the first element in it, what gives it back)."""
        begin = self._top[place]
        end = begin + wanted
        if beside or end > self._limit.get(place, 0):
            free = self._free.setdefault((place, wanted), [])
            buffer = free.pop() if free else torch.empty(wanted, device=place[0], dtype=place[1])
            return buffer, 0, lambda: free.append(buffer)
        if place not in self._stack:
            self._stack[place] = torch.empty(self._limit[place], device=place[0], dtype=place[1])
        self._top[place] = end
        self._taken[place] += 1

        def release() -> None:
            self._taken[place] -= 1
            if not self._taken[place]:
                self._top[place] = 0
            elif self._top[place] == end:  # else what was taken later is still in use, after an error that the model caught
                self._top[place] = begin

        return self._stack[place], begin, release

    def _place(self, p: Trained) -> Place:
        return (self._device or p.tensor.device, p.tensor.dtype)

    def _sizes(self, parameters: Sequence[Trained]) -> dict[Place, int]:
        sizes: dict[Place, int] = {}
        for p in parameters:
            place = self._place(p)
            sizes[place] = sizes.get(place, 0) + _rounded(p.tensor, p.tensor.numel())
        return sizes

    def nbytes(self) -> int:
        """The memory of the stack and of the buffers beside it, where nothing is taken."""
        beside = [buffer for free in self._free.values() for buffer in free]
        return sum(buffer.nbytes for buffer in [*self._stack.values(), *beside])


def _rounded(tensor: Tensor, numel: int) -> int:
    per_line = max(1, _ALIGN // tensor.element_size())
    return -(-numel // per_line) * per_line


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def like(tensor: Tensor, flat: Tensor) -> Tensor:
    """A view of `flat` with the shape of `tensor`, and its strides where they are those of a dense tensor."""
    return flat.as_strided(tensor.shape, tensor.stride()) if not tensor.is_contiguous() and dense(tensor) else flat.view(tensor.shape)
