"""16-bit vectors (gains, biases) are kept in float32 beside the model: rounding noise on a gain near 1 costs accuracy over a long run.

After 20,000 updates a stochastically rounded gain has a thousand times the variance of the updates themselves, and a matrix eighty times
(docs/precision.md). Vectors are a thousandth of the weights, so that exact ones cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zo_lightning.engine.noise.rounding import rounds
from zo_lightning.engine.parameters import Trained


def has_master(tensor: Tensor) -> bool:
    """Whether a trained tensor is kept in float32: 16 bits and at most one dimension."""
    return tensor.dim() < 2 and rounds(tensor.dtype)


class Masters:
    """theta_32 of every 16-bit vector, or `every` 16-bit tensor; the model's own value is theta_32 rounded to nearest."""

    def __init__(self, every: bool = False) -> None:
        self._every = every
        self._kept: dict[int, Tensor] = {}
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def has(self, tensor: Tensor) -> bool:
        """Whether a trained tensor is kept in float32 here."""
        return has_master(tensor) or (self._every and rounds(tensor.dtype))

    def clear(self) -> None:
        """Begin again from the model's values."""
        self._kept = {}

    def instead_of(self, trained: Sequence[Trained]) -> list[Trained]:
        """`trained` with masters in the place of 16-bit vectors. Where the model's value is not its master's, it was written by others, and
        counts.
        """
        self._waiting = []
        groups: dict[tuple[torch.device, torch.dtype], list[Trained]] = {}
        for p in trained:
            if self.has(p.tensor) and p.numel:
                groups.setdefault((p.tensor.device, p.tensor.dtype), []).append(p)
        masters: dict[int, Tensor] = {}
        for (device, dtype), vectors in groups.items():
            now = torch.cat([p.tensor.detach().reshape(-1) for p in vectors])
            flat = torch.cat([self._kept.get(p.key, p.tensor.detach().float()).to(device).reshape(-1) for p in vectors])
            flat = torch.where(flat.to(dtype) == now, flat, now.float())
            for p, part in zip(vectors, flat.split([p.tensor.numel() for p in vectors]), strict=True):
                masters[p.key] = part.view(p.tensor.shape)
                self._waiting.append((p.tensor.detach(), masters[p.key]))
        self._kept.update(masters)
        return [replace(p, tensor=masters[p.key]) if p.key in masters else p for p in trained]

    def write_back(self) -> None:
        """Give the model the masters that `instead_of` lent, rounded to nearest."""
        for tensor, master in self._waiting:
            tensor.copy_(master)

    def cover(self, trained: Sequence[Trained], whole: bool = False) -> bool:
        """Whether every 16-bit vector has a master of its own value; `whole`: those without one never moved, and need none."""
        return all(
            torch.equal(self._kept[p.key].to(p.tensor.device, p.tensor.dtype), p.tensor.detach()) if p.key in self._kept else whole
            for p in trained
            if self.has(p.tensor) and p.tensor.numel()
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by the key of their parameter."""
        return {str(key): master.clone() for key, master in self._kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self._kept = {int(key): master.clone() for key, master in state.items()}
