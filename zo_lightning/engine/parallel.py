"""Who evaluates what, and the exchange of scalars: a step communicates one number a point, never a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Exchange:
    """One process: values are what this process measured."""

    rank = 0
    world_size = 1

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a one-dimensional float64 tensor."""
        return values

    def share(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """What each rank has, in their order, on rank 0; an empty list on the others."""
        return [value]


class DataParallel(Exchange):
    """Ranks see different data and the same z: values are averaged in float64, summed in the order of ranks on every rank."""

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "DataParallel needs an initialized torch.distributed process group; launch with torchrun or a host's launcher."
            )
        self.group = group
        self.device = device or torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def mean(self, values: Tensor) -> Tensor:
        mine = values.to(self.device, torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine, group=self.group)
        return torch.stack(gathered).sum(0) / self.world_size

    def share(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.group, device=self.device)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, group=self.group, group_dst=0)
        return values


def broadcast_parameters(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the tensors of rank 0."""
    with torch.no_grad():
        for tensor in tensors:
            if is_traceable_wrapper_subclass(tensor):  # quantized: what is inside
                broadcast_parameters([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]], group)
                continue
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, 0, group=group)
            tensor.detach().copy_(dense)
