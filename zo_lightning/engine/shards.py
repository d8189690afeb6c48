"""Sharded parameters: a DTensor becomes the local tensor and the region of the whole parameter that it is. What FSDP2 has gathered.

Everything behind `parameters.collect` works on local tensors; what needs a whole parameter asks for it here. Layouts are those of
torch.distributed.tensor: each mesh dimension shards a dimension of the parameter (FSDP2, tensor parallel, both) or has copies of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.noise.region import Region

if TYPE_CHECKING:
    from zo_lightning.engine.parameters import Trained

_DTENSOR, _FSDP = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: of which this process has a part, or a copy among others."""
    module = sys.modules.get(_DTENSOR)  # not imported: nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: of a DTensor the local one, not detached; others as they are."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def place(tensor: Tensor, where: Tensor) -> None:
    """Let a parameter, or what this process has of it, point to the memory of `where`."""
    if is_sharded(tensor):
        tensor._local_tensor = where  # type: ignore[attr-defined]
    else:
        tensor.data = where


def placed(tensor: Tensor) -> Tensor:
    """Where a parameter, or what this process has of it, points now."""
    return local(tensor) if is_sharded(tensor) else tensor.data


def device_of(tensor: Tensor) -> torch.device:
    """Where forward passes use it: shards that rest on the CPU (CPUOffloadPolicy) are gathered on the mesh's device."""
    if is_sharded(tensor):
        kind = tensor.device_mesh.device_type  # type: ignore[attr-defined]
        if kind != local(tensor).device.type:
            return torch.device(kind, getattr(torch, kind).current_device())
    return local(tensor).device


def region_of(name: str, tensor: Tensor) -> Region | None:
    """Which elements of a parameter the local tensor has; None: all of them. ValueError for an unknown placement."""
    if not is_sharded(tensor):
        return None
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"Parameter {name!r} lies on the mesh {mesh}, of which this process is no part. Give each process its own model.")
    kept = [torch.arange(size) for size in shape]
    for at, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or placement.is_partial() or not hasattr(placement, "_split_tensor"):
            raise ValueError(
                f"Parameter {name!r} has the placement {placement!r} on mesh dimension {at}; Shard, _StridedShard (FSDP2 around tensor "
                "parallel) and Replicate can be trained. Redistribute it."
            )
        kept[dim] = _split(placement, kept[dim], mesh.size(at))[coordinate[at]]
    mine = local(tensor)
    if tuple(len(own) for own in kept) != tuple(mine.shape):
        raise ValueError(
            f"Parameter {name!r} has the placements {tensor.placements}, by which rank {coordinate} of the mesh would have a part of shape "  # type: ignore[attr-defined]
            f"{tuple(map(len, kept))}; it has {tuple(mine.shape)}. Shard it by fully_shard, parallelize_module or distribute_tensor."
        )
    return None if mine.numel() == tensor.numel() else Region.of(shape, [own.tolist() for own in kept])


def _split(placement: Any, indices: Tensor, count: int) -> Sequence[Tensor]:
    """The indices of each rank, as the placement deals out the dimension itself."""
    flat = type(placement)(0, split_factor=placement.split_factor) if hasattr(placement, "split_factor") else type(placement)(0)
    pieces, _ = flat._split_tensor(indices, count, with_padding=False, contiguous=False)
    return [*pieces, *[indices[:0]] * (count - len(pieces))]


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what `part` is the local tensor of, sharded as `like` is; to be called on all ranks. Plain tensors as they are."""
    if not is_sharded(like):
        return part
    kind = sys.modules[_DTENSOR].DTensor
    one = kind.from_local(
        part.to(device_of(like)),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=torch.empty(like.shape, device="meta").stride(),
    )
    full: Tensor = one.full_tensor()
    return full.to(part.device)


def summed(part: Tensor, like: Tensor) -> Tensor:
    """The sum of what each rank has of it over the shards of `like`, once for each; called on all ranks. Of plain tensors as it is."""
    if not is_sharded(like):
        return part
    total = part.to(device_of(like), copy=True)
    for at, placement in enumerate(like.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate():
            torch.distributed.all_reduce(total, group=like.device_mesh.get_group(at))  # type: ignore[attr-defined]
    return total


def whole_of(p: Trained) -> Tensor:
    """The whole of a trained parameter; of a sharded one on all ranks at once, and gathered by all of them."""
    return whole(p.tensor.detach(), p.aliases[0]) if is_sharded(p.aliases[0]) else p.tensor


def any_sharded(trained: Sequence[Trained]) -> bool:
    """Whether what needs whole parameters must be asked for by all ranks."""
    return any(is_sharded(p.aliases[0]) for p in trained)


def part(full: Tensor, region: Region | None) -> Tensor:
    """The elements of a region of the whole tensor, one-dimensional; without a region all of it, as it is."""
    return full if region is None else full.reshape(-1)[region.index(full.device)]


# ---- FSDP2: parameters that are gathered while their module runs


def fsdp_modules(module: nn.Module | None) -> list[Any]:
    """The modules that `fully_shard` was called for."""
    found = sys.modules.get(_FSDP)
    kind = getattr(found, "FSDPModule", None)
    return [] if module is None or kind is None else [part for part in module.modules() if isinstance(part, kind)]


def reshard(modules: Sequence[Any], aborted: bool = False) -> None:
    """Free what FSDP2 has gathered: the root keeps its parameters gathered after a forward, and they would stay those of before an update.

    `aborted`: a forward pass ended by an exception, after which FSDP2 takes the next one for a part of it unless it is told.
    """
    if aborted:
        for module in modules:
            if _root(module):
                _forget(module)
    for module in modules:
        module.reshard()


def _root(module: Any) -> bool:
    return module._get_fsdp_state()._is_root is True


def _forget(module: Any) -> None:
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    state = module._get_fsdp_state()  # before torch 2.13
    idle = type(state._training_state).IDLE
    state._state_ctx.iter_forward_root = None
    for one in state._state_ctx.all_states:
        one._training_state = idle
        groups = getattr(one, "_fsdp_param_groups", None) or [one._fsdp_param_group]
        for group in filter(None, groups):
            group.wait_for_unshard()
            group._training_state = idle
