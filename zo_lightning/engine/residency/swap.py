"""Listed elements are displaced in the weights themselves, and get their own values back: cost follows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.noise import Item
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.noise.sweep import put, take
from zo_lightning.engine.parameters import Trained


class Swap:
    """The elements that lists name, with the values of the base weights; read once for all evaluations of a micro-batch.

    Each touch of an element far from the others costs as much as a hundred that follow each other, so there are few of them.
    """

    def __init__(self, parameters: Sequence[tuple[Trained, Listed]]) -> None:
        self._parameters = list(parameters)
        self._base = [take(p.tensor.detach(), mask.index) for p, mask in parameters]
        self._displaced = [torch.empty_like(base) for base in self._base]
        self.away = False

    def items(self, point: Displacement, eps: Sequence[float]) -> list[Item]:
        """What computes the displaced values, without touching the weights."""
        return [
            Item(out, base, p.key, 1.0, tuple(multiple * eps[p.group] for _, multiple in point), places=mask.index)
            for (p, mask), base, out in zip(self._parameters, self._base, self._displaced, strict=True)
        ]

    def leave(self) -> None:
        """Write the displaced values into the weights."""
        self.away = True
        self._write(self._displaced)

    def home(self) -> None:
        """Put the base values back, bit for bit."""
        if self.away:
            self._write(self._base)
            self.away = False

    def _write(self, values: Sequence[Tensor]) -> None:
        for (p, mask), own in zip(self._parameters, values, strict=True):
            put(p.tensor.detach(), mask.index, own)
