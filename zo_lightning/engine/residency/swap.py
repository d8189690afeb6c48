"""Listed elements are displaced in the weights themselves, and get their own values back: cost follows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        self.displaced = [torch.empty_like(base) for base in self._base]
        """The values of the next point."""
        self.away = False

    def compact(self, items: Sequence[Item]) -> list[Item]:
        """Items of whole weights, as items of what is listed of them: they write `displaced`, and touch no weight."""
        return [
            item._replace(base=base, mask=None, places=mask.index)
            for item, base, (_, mask) in zip(items, self._base, self._parameters, strict=True)
        ]

    def leave(self) -> None:
        """Write the displaced values into the weights."""
        self.away = True
        self._write(self.displaced)

    def home(self) -> None:
        """Put the base values back, bit for bit."""
        if self.away:
            self._write(self._base)
            self.away = False

    def _write(self, values: Sequence[Tensor]) -> None:
        for (p, mask), own in zip(self._parameters, values, strict=True):
            put(p.tensor.detach(), mask.index, own)
