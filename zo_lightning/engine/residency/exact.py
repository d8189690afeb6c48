"""weights="exact": block by block, weights are written to scratch when a forward begins and point back when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.memory import Scratch
from zo_lightning.engine.residency.paths import Paths, Tree
from zo_lightning.engine.residency.scratch import OnScratch
from zo_lightning.engine.residency.units import Unit, cover, hookable, rows_read, together, units_of, vectors_of
from zo_lightning.engine.residency.watch import ReadWatch, uncompiled
from zo_lightning.engine.signals import held

KEEP_AFTER = 4
"""A unit that is entered more often than that within one evaluation is kept on scratch of its own until it ends: generation, or layers that
share one block. Losses over pairs (chosen and rejected, policy and reference) make 2 to 4 forwards, and keep to the memory of one unit."""


class Exact(OnScratch):
    """A unit is a block, or a smaller module outside of blocks, or a compiled module as a whole.

    Before the first evaluation one forward pass is watched: a weight that is read while its unit is not running (another module uses it)
    moves to the smallest module that owns it and runs around all its readers, or to the whole evaluation. When another path through the
    model could have begun, a forward pass is watched again before the next evaluation (`Paths`).
    """

    name = "exact"
    lasts = False
    keep_after = KEEP_AFTER

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise, blocks: Sequence[nn.Module] = ()) -> None:
        super().__init__(module, trained, noise)
        self._root: nn.Module = module
        self._blocks = list(blocks)
        self._watch: ReadWatch | None = None
        self._begin()

    def _begin(self) -> None:
        self.units = units_of(self._root, self.trained, self._blocks)
        self._paths = Paths()
        self._arrange()

    def _arrange(self) -> None:
        self._vectors = vectors_of(self.units)
        self._scratch = Scratch(together(self.units, without=self._vectors), self.device)
        modules = {unit: unit.module for unit in self.units if unit.module is not None}
        self._tree = Tree(self._root, list(modules.values()))
        leave = torch.compiler.disable(self._leave)  # a compiled version that the optimizer was not given calls hooks between its graphs
        self._hooks = [(module, torch.compiler.disable(self._enter(unit)), leave) for unit, module in modules.items()]

    def needs_probe(self) -> bool:
        if self._tree.changed():  # modules were replaced, or compiled
            self._begin()
        return self._paths.unknown(self._modes())

    def _modes(self) -> tuple[bool, ...]:
        return (self._root.training, *(unit.module.training for unit in self.units if unit.module is not None))

    @contextmanager
    def probe(self) -> Iterator[None]:
        watch = self._watch = ReadWatch(hookable(self._root), self._watched(), self._may_read, self.device)
        before = self._modes()
        try:
            with uncompiled(self.trained), self.session(), self._displaced(None, ()), watch:
                entries = self._lane.entries
                yield
        finally:
            self._watch = None
        entered, old = set(entries), self.units
        moved = watch.missed
        if moved:
            if self._paths.watched:
                names = ", ".join(p.name for p in moved)
                say_once("exact.moved", f'weights="exact": {names} began to be read by another module after the first step; {_LATE}')
            self._cover(moved)
        self._paths.watch(entered | (set(self.units) - set(old)), set(self.units) - entered, {before, self._modes()})

    def _watched(self) -> list[Trained]:
        """The weights whose readers must be known."""
        return self.trained

    def _may_read(self, p: Trained) -> bool:
        """Whether a weight may be read just now."""
        return self._settled or id(p) in self._lane.away

    def _cover(self, missed: dict[Trained, nn.Module | None]) -> None:
        """From now on each weight is on scratch while the module runs that it was read under."""
        self.units = cover(self.units, missed)
        self._arrange()

    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), ExitStack() as attached:
            attached.callback(self._close)
            for module, enter, leave in self._hooks:
                plain = module._compiled_call_impl
                if plain is None:
                    attached.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                    attached.callback(module.register_forward_hook(leave, always_call=True).remove)
                else:
                    attached.callback(setattr, module, "_compiled_call_impl", plain)
                    module._compiled_call_impl = _around(module, plain, enter, leave)
            yield

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        with self._displaced(point, eps):
            entries = self._lane.entries  # that of another thread may be there after the turn
            yield
        hooked = {unit for unit in self.units if unit.module is not None}
        self._paths.took(entries.keys(), hooked)

    @contextmanager
    def _displaced(self, point: Displacement | None, eps: Sequence[float]) -> Iterator[None]:
        with self._turns.turn(), ExitStack() as whole:
            self._lane.point = (point, eps)
            self._lane.materialized = 0
            self._lane.entries.clear()
            whole.callback(self._lane.kept.clear)
            whole.enter_context(self._swapped(point, eps))
            if point is not None:
                self._prepare(whole, point, eps)
            for unit in self.units:
                if unit.module is None:
                    whole.enter_context(self._based(unit.parameters))
                    whole.enter_context(self._on_scratch(unit, point, eps))
            self._lane.whole = whole
            try:
                yield
            finally:
                self._lane.point = None
                self._lane.open.close()

    def _prepare(self, whole: ExitStack, point: Displacement, eps: Sequence[float]) -> None:
        """Write the vectors of all units in one go; each unit still has its own only while it runs."""
        vectors = self._dense(self._vectors)
        outs, give_back = self._scratch.take(vectors, beside=True)
        whole.callback(give_back)
        whole.callback(self._lane.ready.clear)
        self._write(vectors, outs, point, eps)
        self._lane.ready.update((id(p), out) for p, out in zip(vectors, outs, strict=True))

    def _enter(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._lane.point is not None:
                with held(), torch.no_grad():
                    stack = ExitStack()
                    stack.enter_context(self._based(unit.parameters))
                    point = self._lane.point  # a reading thread had to wait until the evaluation was over
                    if point is not None:
                        stack.enter_context(self._shown(unit, args, *point))
                    self._lane.open.entered(module, stack)

        return hook

    def _based(self, parameters: Sequence[Trained]) -> AbstractContextManager[None]:
        """Inside it, `parameters` hold their base weights where forward passes run."""
        return nullcontext()

    def _on_scratch(
        self, unit: Unit, point: Displacement | None, eps: Sequence[float], rows: Tensor | None = None
    ) -> AbstractContextManager[None]:
        if point is None:
            return self._pointed_home([p for p in unit.parameters if id(p) not in self._lane.away])
        return self._materialized(unit.parameters, point, eps, rows)

    def _shown(self, unit: Unit, args: Any, point: Displacement | None, eps: Sequence[float]) -> AbstractContextManager[None]:
        todo = [p for p in unit.parameters if id(p) not in self._lane.away]
        self._lane.entries[unit] += bool(todo)  # a unit inside another call of itself has nothing to do
        todo = todo if point is None else self._dense(todo)
        if todo and point is not None and self._lane.entries[unit] > self.keep_after:
            kept = self._lane.kept.get(unit) or self._keep(unit, todo, point, eps)
            if all(id(p) in kept for p in todo):
                return self._pointed(todo, [kept[id(p)] for p in todo])
        return self._on_scratch(unit, point, eps, rows_read(unit, args))

    def _keep(self, unit: Unit, todo: Sequence[Trained], point: Displacement, eps: Sequence[float]) -> dict[int, Tensor]:
        """Scratch of the unit's own with its weights, which it has until the evaluation ends."""
        fresh = [p for p in todo if id(p) not in self._lane.ready]
        outs, give_back = self._scratch.take(fresh, beside=True)
        self._lane.whole.callback(give_back)
        self._write(fresh, outs, point, eps)
        written = {id(p): out for p, out in zip(fresh, outs, strict=True)}
        self._lane.kept[unit] = {id(p): written[id(p)] if id(p) in written else self._lane.ready[id(p)] for p in todo}
        return self._lane.kept[unit]

    def _close(self) -> None:
        self._lane.open.close()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._lane.open:
            with held():
                self._lane.open.left(module)


def _around(module: nn.Module, call: Callable[..., Any], enter: Callable[..., None], leave: Callable[..., None]) -> Callable[..., Any]:
    """A compiled call of `module.compile()`, inside the unit: hooks that are added after the first call never run."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        enter(module, args)
        try:
            return call(*args, **kwargs)
        finally:
            leave(module, args, None)

    return inside


_LATE = "until now it was perturbed only where its own module ran. From now on it is perturbed for every reader."
