"""Listed elements are displaced in the weights themselves, and get their own values back: cost follows what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.noise.sweep import put, take
from zo_lightning.engine.parameters import Trained


class Swap:
    """The elements that lists name, with the values of the base weights."""

    def __init__(self, parameters: Sequence[tuple[Trained, Listed]]) -> None:
        self._places = [(p.tensor.detach(), mask.index) for p, mask in parameters]
        self._base = self._read()
        self._away: list[Tensor] = []

    def _read(self) -> list[Tensor]:
        return [take(tensor, index) for tensor, index in self._places]

    def displaced(self) -> None:
        """The weights have been displaced."""
        self._away = self._read()

    def home(self) -> None:
        """Put the base values back, bit for bit."""
        self._write(self._base)

    def back(self) -> None:
        """Displace the weights again, after `home`."""
        self._write(self._away)

    def _write(self, values: Sequence[Tensor]) -> None:
        for (tensor, index), own in zip(self._places, values, strict=True):
            put(tensor, index, own)
