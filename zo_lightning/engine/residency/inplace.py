"""weights="inplace": theta + eps z, then theta - eps z, then restored, in the weights themselves. No extra memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Change, Item, sweep
from zo_lightning.engine.noise.changes import apply_through, hold, moves, step_of
from zo_lightning.engine.noise.members import Band, Bits, Members
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency, eps_of
from zo_lightning.engine.residency.turns import Turns
from zo_lightning.engine.signals import held

_LAST, SESSION, ORIGIN = 253, 254, 255
"""Bytes of `take_passes`: the evaluations of a micro-batch begin; the weights are moved back. Others: moved to that point of the step."""


class InPlace(Residency):
    """Each move is one pass over the weights. In floating point (w + eps z) - 2 eps z + eps z is w up to rounding, not exactly.

    Inside `fused` the last perturbation stays in place until `update`, which then restores and updates in one pass. Moves round to nearest,
    the update of 16-bit weights stochastically.
    """

    name = "inplace"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._defer_restore = False
        self._here: dict[int, float] = {}
        self._eps: Sequence[float] = ()
        self._turns = Turns()
        self._passes = bytearray()
        self._points: list[Displacement] = []
        self._bits: dict[int, Bits] = {}
        """Masks that follow the weights, as they were before this step's first move."""

    @contextmanager
    def session(self) -> Iterator[None]:
        self._passes.append(SESSION)
        with self._turns.turn():
            try:
                yield
                if not self._defer_restore:
                    self.restore()
            except BaseException:
                self.restore()
                raise

    def still(self) -> AbstractContextManager[None]:
        return self._turns.turn()

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        if point not in self._points:
            self._points.append(point)
        self._passes.append(min(self._points.index(point), _LAST))
        self._move(dict(point), eps)
        yield

    def restore(self) -> None:
        """Undo a perturbation that was left in place."""
        if self._here:
            self._passes.append(ORIGIN)
        self._move({}, self._eps)

    @property
    def moves(self) -> int:
        """How many bytes `take_passes` would give."""
        return len(self._passes)

    def take_passes(self) -> bytes:
        """The moves since the last time: what they rounded, a replay must round again."""
        passes, self._passes, self._points = bytes(self._passes), bytearray(), []
        return passes

    def ended(self) -> None:
        super().ended()
        self._bits = {}

    def _mask(self, p: Trained) -> Members | None:
        mask = self.masks.of(p.key)
        if not isinstance(mask, Band):
            return mask
        if p.key not in self._bits:
            self._bits[p.key] = Bits.taken(mask, p.tensor.detach(), p.region)
        return self._bits[p.key]

    def reenact(self, passes: bytes, points: Sequence[Displacement], eps: Sequence[float]) -> None:
        """Make the moves that `take_passes` told, but for those at their beginning that were made since the last update."""
        made = bytes(self._passes)
        for code in passes.removeprefix(made):
            if code < len(points):
                self._move(dict(points[code]), eps)
            elif code == ORIGIN:
                self._move({}, eps)

    @contextmanager
    def fused(self) -> Iterator[None]:
        self._defer_restore = True
        with self._turns.turn():
            try:
                yield
            finally:
                self._defer_restore = False
                self.restore()

    def update(self, change: Change) -> None:
        if change.through is not None:
            self.restore()
            moving = [p for p in self.moving(self.trained) if moves(change, p.group)]
            with self.still(), held():
                apply_through(moving, change, self.noise, {p.key: mask for p in moving if (mask := self._mask(p)) is not None})
            return
        back = self._here
        every = list(dict.fromkeys([*back, *change.seeds])) if back else list(change.seeds)
        items = []
        for p in self.moving(self.trained):
            decay, coefficients = step_of(change, p)
            if back:
                total = {seed: -decay * multiple * eps_of(p, self._eps) for seed, multiple in back.items()}
                for seed, c in zip(change.seeds, coefficients, strict=True):
                    total[seed] = total.get(seed, 0.0) + c
                coefficients = tuple(total.get(seed, 0.0) for seed in every)
            weights = p.tensor.detach()
            item = Item(weights, weights, p.key, decay, coefficients, mask=self._mask(p), region=p.region)
            if decay != 1.0 or any(item.coefficients):
                items.append(item)
        with self.still(), held():
            self._here = {}
            sweep(items, every, self.noise, rounding=change.rounding)
            hold(self.moving(self.trained))

    def _move(self, target: dict[int, float], eps: Sequence[float]) -> None:
        """One pass from the displacement in place to `target`. Not interrupted by signals; undone where it fails."""
        change = {seed: target.get(seed, 0.0) - self._here.get(seed, 0.0) for seed in [*self._here, *target]}
        change = {seed: multiple for seed, multiple in change.items() if multiple}
        if not change:
            return
        items = []
        for p in self.moving(self.trained):
            weights = p.tensor.detach()
            coefficients = tuple(multiple * eps_of(p, eps) for multiple in change.values())
            items.append(Item(weights, weights, p.key, 1.0, coefficients, mask=self._mask(p), region=p.region))
        done: list[Item] = []
        with held():
            try:
                sweep(items, list(change), self.noise, done)
            except BaseException:
                sweep([item._replace(coefficients=tuple(-c for c in item.coefficients)) for item in done], list(change), self.noise)
                raise
            self._here, self._eps = target, tuple(eps)
