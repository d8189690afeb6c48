"""Listed elements are displaced in the weights themselves, and get their own values back: cost follows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise import Item
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.noise.places import put, take
from zo_lightning.engine.parameters import Trained


class Swap:
    """The elements that lists name, with the values of the base weights; read once for all evaluations of a micro-batch.

    Each touch of an element far from the others costs as much as a hundred that follow each other, so there are few of them.
    """

    def __init__(self, parameters: Sequence[tuple[Trained, Listed]]) -> None:
        self._parameters = list(parameters)
        located = [(mask.index, mask.index) if p.region is None else p.region.locate(mask.index) for p, mask in parameters]
        self._places = [places for _, places in located]
        """Of the listed elements that are here: where they are."""
        self._index = [index if p.region is None else mask.index[index] for (index, _), (p, mask) in zip(located, parameters, strict=True)]
        self._base = [take(p.tensor.detach(), places) for (p, _), places in zip(parameters, self._places, strict=True)]
        self.displaced = [torch.empty_like(base) for base in self._base]
        """The values of the next point."""
        self.away = False

    def compact(self, items: Sequence[Item]) -> list[Item]:
        """Items of whole weights, as items of what is listed of them: they write `displaced`, and touch no weight."""
        return [
            item._replace(base=base, mask=None, places=index, whole=item.shape)
            for item, base, index in zip(items, self._base, self._index, strict=True)
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
        for (p, _), places, own in zip(self._parameters, self._places, values, strict=True):
            put(p.tensor.detach(), places, own)
