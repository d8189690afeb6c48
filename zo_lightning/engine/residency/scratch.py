"""weights="copy", and what "exact" shares with it: forward passes run on theta + c z in scratch memory, base weights are never written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _len_torch_dispatch_stack

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Noise, joins, sweep, sweep_both
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.residency.lane import Ahead, Lane
from zo_lightning.engine.residency.memory import Scratch
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.turns import Turns
from zo_lightning.engine.shards import place, placed
from zo_lightning.engine.signals import held


class OnScratch(Residency):
    """Points weights at scratch memory and back."""

    device: torch.device | None = None
    """Where weights are while forward passes run; None: where they lie."""

    def __init__(self, module: nn.Module | None, trained: Sequence[Trained], noise: Noise) -> None:
        super().__init__(module, trained, noise)
        self._scratch = Scratch([self.trained])
        self._turns = Turns()
        self._lane = Lane()
        """Of the evaluation that runs, or ran last."""
        self._in_session = False
        self._settled = False

    def reached(self) -> bool:
        return self._lane.materialized > 0

    def scratch_bytes(self) -> int:
        """The scratch memory that stays between evaluations, in bytes."""
        return self._scratch.nbytes()

    @contextmanager
    def still(self) -> Iterator[None]:
        """It waits for the evaluation of another thread to end.

        In the middle of an evaluation of its own thread it points the parameters back and, on the way out, to scratch again.
        """
        with self._turns.turn():
            mine, before, self._settled = self._lane, self._settled, True
            self.go_on(Lane(materialized=mine.materialized))  # which is asked for without a turn
            try:
                yield
            finally:
                self.go_on(mine)
                self._settled = before

    def go_on(self, lane: Lane) -> None:
        """Another evaluation runs from now on: all weights of the present one point back to their base."""
        for p, bases, _ in self._lane.away.values():
            _point(p, bases)
        if self._lane.swap is not None:
            self._lane.displaced = self._lane.swap.away
            self._lane.swap.home()
        self._lane = lane
        if lane.swap is not None and lane.displaced:
            lane.swap.leave()
        for p, _, out in lane.away.values():
            _point(p, [out] * len(p.aliases))

    @contextmanager
    def _materialized(
        self, parameters: Sequence[Trained], point: Displacement, eps: Sequence[float], rows: Tensor | None = None
    ) -> Iterator[None]:
        """Inside it, `parameters` (but those that are away already) are on scratch of their own."""
        here = [p for p in self._dense(parameters) if id(p) not in self._lane.away]
        ready = [p for p in here if id(p) in self._lane.ready]
        todo = [p for p in here if id(p) not in self._lane.ready]
        outs, give_back = self._scratch.take(todo)
        try:
            self._write(todo, outs, point, eps, rows)
            with self._pointed([*todo, *ready], [*outs, *(self._lane.ready[id(p)] for p in ready)]):
                yield
        finally:
            give_back()

    def _dense(self, parameters: Sequence[Trained]) -> list[Trained]:
        """Those that need scratch: of the others the mask trains nothing, or a list of elements."""
        if self.masks.chosen is None:
            return list(parameters)
        return [p for p in parameters if self.masks.trains(p.key) and not isinstance(self.masks.of(p.key), Listed)]

    @contextmanager
    def session(self) -> Iterator[None]:
        within, self._in_session = self._in_session, True
        try:
            yield
        finally:
            self._in_session = within
            with self._turns.turn():  # a reader that has it will displace the weights again
                self._go_home()

    @contextmanager
    def _swapped(self, point: Displacement | None, eps: Sequence[float]) -> Iterator[None]:
        """Inside it, listed elements are displaced in the weights themselves, wherever these are read; in a session they stay so until the
        next point.
        """
        masked = self.steady() if point and self.masks.chosen is not None else ()
        listed = [(p, mask) for p in masked if isinstance(mask := self.mask_of(p), Listed)]
        if not listed or not point:
            self._go_home()
            yield
            return
        try:
            with held(), _without_modes():
                self._lane.swap = self._lane.swap or Swap(listed)
                items = self._lane.swap.compact(self.displaced([p for p, _ in listed], self._lane.swap.displaced, point, eps))
                sweep(items, [seed for seed, _ in point], self.noise, rounding=point[0][0])
                self._lane.swap.leave()
            self._lane.materialized += 1
            yield
        finally:
            if not self._in_session:
                self._go_home()

    @contextmanager
    def swapped(self, swap: Swap) -> Iterator[None]:
        with self._turns.turn():
            try:
                with held(), _without_modes():
                    self._lane.swap = swap
                    swap.leave()
                yield
            finally:
                self._go_home()

    def _go_home(self) -> None:
        with held(), _without_modes():
            swap, self._lane.swap = self._lane.swap, None
            if swap is not None:
                swap.home()

    def _write(
        self, todo: Sequence[Trained], outs: Sequence[Tensor], point: Displacement, eps: Sequence[float], rows: Tensor | None = None
    ) -> None:
        if not todo:
            return
        with _without_modes():
            rounding = point[0][0] if point else None  # the same for both sides: their difference then varies least
            sweep(self.displaced(todo, outs, point, eps, rows), [seed for seed, _ in point], self.noise, rounding=rounding)

    @contextmanager
    def _pointed(self, parameters: Sequence[Trained], outs: Sequence[Tensor]) -> Iterator[None]:
        """Inside it, `parameters` point to `outs`."""
        self._lane.materialized += 1
        with _without_modes():
            bases = [[placed(alias) for alias in p.aliases] for p in parameters]
        try:
            for p, base, out in zip(parameters, bases, outs, strict=True):
                self._lane.away[id(p)] = (p, base, out)
                for alias in p.aliases:
                    place(alias, out)
            yield
        finally:
            for p, base in zip(parameters, bases, strict=True):
                for alias, data in zip(p.aliases, base, strict=True):
                    place(alias, data)
                self._lane.away.pop(id(p), None)

    def _pointed_home(self, parameters: Sequence[Trained]) -> AbstractContextManager[None]:
        """Inside it, `parameters` count as away, and point to their base weights as before."""
        with _without_modes():
            places = [p.tensor.detach() for p in parameters]
        return self._pointed(parameters, places)


def _without_modes() -> AbstractContextManager[Any]:
    """No dispatch mode sees what is done in here: neither our own, which watches reads, nor the user's."""
    return _disable_current_modes() if _len_torch_dispatch_stack() else nullcontext()


def _point(parameter: Trained, places: Sequence[Tensor]) -> None:
    for alias, where in zip(parameter.aliases, places, strict=True):
        place(alias, where)


class Copy(OnScratch):
    """What is trained as one block: right for small trainable sets, for it needs that much memory again.

    Very small ones, of which Python takes longer than arithmetic, are written for a point and its opposite at once: twice that memory.
    """

    name = "copy"

    def expect(self, points: Sequence[Displacement]) -> None:
        self._lane.expected = points

    @contextmanager
    def session(self) -> Iterator[None]:
        try:
            with super().session():
                yield
        finally:
            self._lane.expected = ()
            if (ahead := self._take_ahead()) is not None:
                ahead.give_back()

    def _take_ahead(self) -> Ahead | None:
        ahead, self._lane.ahead = self._lane.ahead, None
        return ahead

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        with self._turns.turn():
            if not point:
                yield
                return
            with self._swapped(point, eps), self._written(point, eps), self._materialized(self.trained, point, eps):
                yield

    @contextmanager
    def _written(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        """Inside it, what is written for this point already is ready."""
        here = self._dense(self.trained)
        ahead = self._take_ahead()
        if ahead is not None and ahead.point != point:
            ahead.give_back()
            ahead = None
        ahead = ahead or self._write_both(here, point, eps)
        if ahead is None:
            yield
            return
        self._lane.ready.update((id(p), out) for p, out in zip(here, ahead.outs, strict=True))
        try:
            yield
        finally:
            self._lane.ready.clear()
            ahead.give_back()

    def _write_both(self, here: Sequence[Trained], point: Displacement, eps: Sequence[float]) -> Ahead | None:
        """Write this point and its opposite, if that comes next and both fit into one pass; the opposite is kept as what is ahead."""
        expected = self._lane.expected
        after = expected[expected.index(point) + 1 :] if point in expected else ()
        if len(point) != 1 or not after or after[0] != ((point[0][0], -point[0][1]),) or self.masks.chosen is not None:
            return None
        if (
            any(p.region is not None for p in here)
            or not joins([p.tensor for p in here], self.noise)
            or not available(here[0].tensor.device.type)
        ):
            return None
        outs, give_back = self._scratch.take(here)
        opposite, give_back_opposite = self._scratch.take(here)
        with _without_modes():
            sweep_both(self.displaced(here, outs, point, eps), opposite, point[0][0], self.noise)
        self._lane.ahead = Ahead(after[0], opposite, give_back_opposite)
        return Ahead(point, outs, give_back)
