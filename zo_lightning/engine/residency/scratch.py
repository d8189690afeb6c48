"""weights="copy" and "exact": forward passes run on theta + c z in scratch memory; the base weights are only written by the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Noise, sweep
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency, displaced
from zo_lightning.engine.residency.units import ReadWatch, Unit, cover, rows_read, units_of
from zo_lightning.engine.signals import held

Place = tuple[torch.device, torch.dtype]

_ALIGN = 64
"""Bytes. Matrix kernels may round differently on unaligned memory; scratch is aligned as allocations are."""


class Scratch:
    """Buffers that are used again and again. Units that run one after another share one as large as the largest; others have their own."""

    def __init__(self, in_turn: Sequence[Sequence[Trained]] = ()) -> None:
        self._free: dict[tuple[Place, int], list[Tensor]] = {}
        self._largest: dict[Place, int] = {}
        for parameters in in_turn:
            for place, wanted in _sizes(parameters).items():
                self._largest[place] = max(self._largest.get(place, 0), wanted)

    def take(self, parameters: Sequence[Trained], in_turn: bool) -> tuple[list[Tensor], Callable[[], None]]:
        """Uninitialised tensors like `parameters`, which belong to a unit of that kind, and what gives their memory back."""
        buffers: dict[Place, Tensor] = {}
        for place, wanted in _sizes(parameters).items():
            size = self._largest[place] if in_turn else wanted
            free = self._free.setdefault((place, size), [])
            buffers[place] = free.pop() if free else torch.empty(size, device=place[0], dtype=place[1])
        outs, used = [], dict.fromkeys(buffers, 0)
        for p in parameters:
            place = (p.tensor.device, p.tensor.dtype)
            outs.append(_like(p.tensor, buffers[place], used[place]))
            used[place] += _rounded(p.tensor)

        def give_back() -> None:
            for place, buffer in buffers.items():
                self._free[place, buffer.numel()].append(buffer)

        return outs, give_back


def _rounded(tensor: Tensor) -> int:
    per_line = max(1, _ALIGN // tensor.element_size())
    return -(-tensor.numel() // per_line) * per_line


def _sizes(parameters: Sequence[Trained]) -> dict[Place, int]:
    sizes: dict[Place, int] = {}
    for p in parameters:
        place = (p.tensor.device, p.tensor.dtype)
        sizes[place] = sizes.get(place, 0) + _rounded(p.tensor)
    return sizes


def _like(tensor: Tensor, buffer: Tensor, offset: int) -> Tensor:
    """A view of `buffer` with the shape of `tensor`, and its strides where they are those of a dense tensor."""
    flat = buffer[offset : offset + tensor.numel()]
    if not tensor.is_contiguous() and torch.empty_like(tensor, device="meta").stride() == tensor.stride():
        return flat.as_strided(tensor.shape, tensor.stride())
    return flat.view(tensor.shape)


def _encloses(unit: Unit, units: Sequence[Unit]) -> bool:
    """Whether other units run while this one does."""
    inside = set(unit.module.modules()) if unit.module is not None else {other.module for other in units}
    return any(other is not unit and other.module in inside for other in units)


class _OnScratch(Residency):
    """Points weights at scratch memory and back."""

    def __init__(self, module: nn.Module | None, trained: Sequence[Trained], noise: Noise) -> None:
        super().__init__(module, trained, noise)
        self._scratch = Scratch()
        self._away: set[int] = set()
        self.materialized = 0
        """How many units the last evaluation wrote to scratch: 0 means that no perturbation reached the model."""

    def reached(self) -> bool:
        return self.materialized > 0

    @contextmanager
    def _materialized(
        self, parameters: Sequence[Trained], point: Displacement, eps: Sequence[float], rows: Tensor | None = None, in_turn: bool = False
    ) -> Iterator[None]:
        todo = [p for p in parameters if id(p) not in self._away]
        outs, give_back = self._scratch.take(todo, in_turn)
        bases: list[list[Tensor]] = []
        try:
            with _disable_current_modes():
                bases.extend([alias.data for alias in p.aliases] for p in todo)
                rounding = point[0][0] if point else None  # the same for both sides: their difference then varies least
                sweep(displaced(todo, outs, point, eps, rows), [seed for seed, _ in point], self.noise, rounding=rounding)
            for p, out in zip(todo, outs, strict=True):
                self._away.add(id(p))
                for alias in p.aliases:
                    alias.data = out
            self.materialized += 1
            yield
        finally:
            for p, base in zip(todo, bases, strict=False):
                for alias, data in zip(p.aliases, base, strict=True):
                    alias.data = data
                self._away.discard(id(p))
            give_back()


class Copy(_OnScratch):
    """What is trained as one block: right for small trainable sets, for it needs that much memory again."""

    name = "copy"

    def at(self, point: Displacement, eps: Sequence[float]) -> AbstractContextManager[None]:
        return self._materialized(self.trained, point, eps) if point else nullcontext()


class Exact(_OnScratch):
    """Block by block: a unit's weights are written to scratch when its forward begins and point back when it ends.

    Before the first evaluation one forward pass is watched: a weight that is read while its unit is not running (another module uses it)
    moves to the smallest running module that owns it, or to the whole evaluation.
    """

    name = "exact"

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise, blocks: Sequence[nn.Module] = ()) -> None:
        super().__init__(module, trained, noise)
        self._root: nn.Module = module
        self.units: list[Unit] = units_of(module, trained, blocks)
        self._expect()
        self._point: tuple[Displacement, Sequence[float]] | None = None
        self._open: dict[nn.Module, list[ExitStack]] = {}
        self._probed = False

    def _expect(self) -> None:
        self._in_turn = {id(unit) for unit in self.units if not _encloses(unit, self.units)}
        self._scratch = Scratch([unit.parameters for unit in self.units if id(unit) in self._in_turn])

    def needs_probe(self) -> bool:
        return not self._probed

    @contextmanager
    def probe(self) -> Iterator[None]:
        watch = ReadWatch(self._root, self.trained)
        with self.session(), self.at((), [0.0] * len(self.trained)), watch:
            yield
        moved = watch.missed
        if moved:
            self.units = cover(self.units, moved)
            self._expect()
        self._probed = True

    @contextmanager
    def session(self) -> Iterator[None]:
        hooks: list[Any] = []
        try:
            for unit in self.units:
                if unit.module is not None:
                    # a compiled version of the model calls them between its graphs
                    enter, leave = torch.compiler.disable(self._enter(unit)), torch.compiler.disable(self._leave)
                    hooks.append(unit.module.register_forward_pre_hook(enter, prepend=True))
                    hooks.append(unit.module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._close_all()

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        self._point = (point, eps)
        self.materialized = 0
        with ExitStack() as whole:
            for unit in self.units:
                if unit.module is None:
                    whole.enter_context(self._materialized(unit.parameters, point, eps))
            try:
                yield
            finally:
                self._point = None
                self._close_all()

    def _enter(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._point is not None:
                with held():
                    stack = ExitStack()
                    rows, in_turn = rows_read(unit, args), id(unit) in self._in_turn
                    stack.enter_context(self._materialized(unit.parameters, *self._point, rows, in_turn))
                    self._open.setdefault(module, []).append(stack)

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stacks = self._open.get(module)
        if stacks:
            with held():
                stacks.pop().close()

    def _close_all(self) -> None:
        """After an exception inside a unit: what is still open, innermost first."""
        for stacks in reversed(list(self._open.values())):
            while stacks:
                stacks.pop().close()
        self._open = {}
