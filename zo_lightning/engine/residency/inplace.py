"""weights="inplace": theta + eps z, then theta - eps z, then restored, in the weights themselves. No extra memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Item, sweep
from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.signals import held


class InPlace(Residency):
    """Each move is one pass over the weights. In floating point (w + eps z) - 2 eps z + eps z is w up to rounding, not exactly.

    `defer_restore` leaves the last perturbation in place until `update`, which then restores and updates in one pass.
    """

    name = "inplace"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.defer_restore = False
        self._here: dict[int, float] = {}
        self._eps: Sequence[float] = ()

    @contextmanager
    def session(self) -> Iterator[None]:
        try:
            yield
            if not self.defer_restore:
                self.restore()
        except BaseException:
            self.restore()
            raise

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        self._move(dict(point), eps)
        yield

    def restore(self) -> None:
        """Undo a perturbation that was left in place."""
        self._move({}, self._eps)

    def update(self, seeds: Sequence[int], steps: Sequence[tuple[float, tuple[float, ...]]]) -> None:
        back = self._here
        every = list(dict.fromkeys([*back, *seeds]))
        items = []
        for p in self.trained:
            decay, coefficients = steps[p.group]
            total = {seed: -decay * multiple * self._eps[p.group] for seed, multiple in back.items()}
            for seed, c in zip(seeds, coefficients, strict=True):
                total[seed] = total.get(seed, 0.0) + c
            weights = p.tensor.detach()
            item = Item(weights, weights, p.key, decay, tuple(total.get(seed, 0.0) for seed in every))
            if decay != 1.0 or any(item.coefficients):
                items.append(item)
        with held():
            self._here = {}
            sweep(items, every, self.noise)

    def _move(self, target: dict[int, float], eps: Sequence[float]) -> None:
        """One pass from the displacement in place to `target`. Not interrupted by signals; undone where it fails."""
        change = {seed: target.get(seed, 0.0) - self._here.get(seed, 0.0) for seed in [*self._here, *target]}
        change = {seed: multiple for seed, multiple in change.items() if multiple}
        if not change:
            return
        items = []
        for p in self.trained:
            weights = p.tensor.detach()
            items.append(Item(weights, weights, p.key, 1.0, tuple(multiple * eps[p.group] for multiple in change.values())))
        done: list[Item] = []
        with held():
            try:
                sweep(items, list(change), self.noise, done)
            except BaseException:
                sweep([item._replace(coefficients=tuple(-c for c in item.coefficients)) for item in done], list(change), self.noise)
                raise
            self._here, self._eps = target, tuple(eps)
