"""Were weights changed by anything but steps? Seen by torch's version counters, and by a sample of values where these were bypassed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency

_TENSORS, _VALUES = 32, 64
"""How many tensors, the largest, are sampled, and how many values of each."""

State = tuple[tuple[tuple[int, int], ...], tuple[Tensor, ...]]


class Watch:
    """Looks at weights at every step; where they lie, and the views of their samples, are kept as long as nothing moved."""

    def __init__(self) -> None:
        self._places: tuple[int, ...] = ()
        self._samples: list[list[Tensor]] = []

    def state(self, residency: Residency) -> State:
        """(address and version of every tensor, sampled values). Costs some microseconds a tensor; reads no more than 2,048 values.

        Values are those of tensors to which updates are made at once.
        """
        places = tuple(0 if residency.keeps(p.tensor) else p.tensor.data_ptr() for p in residency.trained)
        if places != self._places:
            self._places, self._samples = places, _samples(residency.steady())
        versions = tuple(p.tensor._version for p in residency.trained)
        return tuple(zip(places, versions, strict=True)), tuple(torch.cat([v.reshape(-1) for v in views]) for views in self._samples)


def _samples(trained: Sequence[Trained]) -> list[list[Tensor]]:
    """Views of some values of the largest tensors, by device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in sorted(trained, key=lambda p: -p.tensor.numel())[:_TENSORS]:
        found.setdefault((p.tensor.device, p.tensor.dtype), []).append(_sample(p.tensor.detach()))
    return list(found.values())


def _sample(tensor: Tensor) -> Tensor:
    """A view of some values."""
    if not tensor.is_contiguous():
        return tensor[: max(1, _VALUES // max(1, tensor[0].numel()))]
    flat = tensor.view(-1)
    return flat[:: max(1, flat.numel() // _VALUES)]


def same(left: State, right: State) -> bool:
    """Whether nothing was seen to change. NaN equals NaN."""
    return left[0] == right[0] and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left[1], right[1], strict=True)
    )
