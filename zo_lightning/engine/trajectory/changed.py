"""Were weights changed by anything but steps? Seen by torch's version counters, and by a sample of values where these were bypassed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_lightning.engine.parameters import Trained

_TENSORS, _VALUES = 32, 64
"""How many tensors, the largest, are sampled, and how many values of each."""

State = tuple[tuple[tuple[int, int], ...], tuple[Tensor, ...]]


def state_of(trained: Sequence[Trained]) -> State:
    """(address and version of every tensor, sampled values). Costs some microseconds a tensor; reads no more than 2,048 values."""
    versions = tuple((p.tensor.data_ptr(), p.tensor._version) for p in trained)
    largest = sorted(trained, key=lambda p: -p.tensor.numel())[:_TENSORS]
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in largest:
        samples.setdefault((p.tensor.device, p.tensor.dtype), []).append(_sample(p.tensor.detach()))
    return versions, tuple(torch.cat(values) for values in samples.values())


def _sample(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        tensor = tensor[: max(1, _VALUES // max(1, tensor[0].numel()))]
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _VALUES)]


def same(left: State, right: State) -> bool:
    """Whether nothing was seen to change. NaN equals NaN."""
    return left[0] == right[0] and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left[1], right[1], strict=True)
    )
