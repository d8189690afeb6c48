"""Whether processes that train together are alike: their options, parameters, weights and versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.parallel.mesh import NOT_SHARDED
from zo_lightning.engine.residency import Offloaded
from zo_lightning.engine.shards import any_sharded, is_sharded, local, summed

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 20
"""Words that are summed at once: on a CPU a sum of integers makes wide copies of them."""


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> str:
    """Of the bits: their sum as integers, tensor by tensor, on the device where they are. Two bits that differ nearly always show.

    Of a DTensor it is the sum over the whole of it, for which all ranks of its mesh have to call; copies of it are not added up.
    """
    sums = [int(summed(_sum(local(tensor)), tensor)) for tensor in tensors]
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()


def _sum(tensor: Tensor) -> Tensor:
    return torch.stack([part.sum(dtype=torch.int64) for part in _bits(tensor).split(_PART)]).sum()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_WORDS[tensor.element_size()]).flatten()


@torch.no_grad()
def sum_of(batch: Any) -> int:
    """What a batch holds as one number below 2**53: tensors, arrays, numbers and texts; 0 where there are none, or nobody gave it.

    Of mappings and sequences it is what they have; of other objects, and dataclasses, their attributes that are tensors or arrays.
    """
    total = 0
    for leaf in _leaves(batch, set()):
        total = (31 * total + _number(leaf) + 1) % (1 << 53)
    return total


def _leaves(value: Any, above: set[int]) -> Iterator[Any]:
    """Tensors, arrays, and what stands in containers; `above` are the containers that it stands in."""
    if value is None or isinstance(value, (Tensor, np.ndarray, np.generic, str, bytes, bool, int, float, complex)):
        yield value
    elif id(value) not in above:
        above = above | {id(value)}
        if isinstance(value, Mapping):
            for key in value:
                yield str(key)
                yield from _leaves(value[key], above)
        elif isinstance(value, Sequence):
            for one in value:
                yield from _leaves(one, above)
        else:  # its other attributes may well be of the process
            for one in getattr(value, "__dict__", {}).values():
                if not isinstance(one, (str, bytes, bool, int, float, complex)) and one is not None:
                    yield from (leaf for leaf in _leaves(one, above) if isinstance(leaf, (Tensor, np.ndarray)))


def _number(leaf: Any) -> int:
    if isinstance(leaf, np.ndarray) and leaf.dtype != object and leaf.dtype.kind in "biuf":
        leaf = torch.from_numpy(np.ascontiguousarray(leaf).view(np.uint8).copy())
    if not isinstance(leaf, Tensor):
        return int.from_bytes(hashlib.blake2b(repr(leaf).encode(errors="replace"), digest_size=6).digest(), "little")
    if leaf.layout != torch.strided or leaf.is_meta:
        return 0
    real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    bits = _bits(real).long()
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # so that rows in another order show
    return int((bits * places).sum())


def described(optimizer: ZOOptimizer) -> dict[str, str]:
    """What has to be the same on all ranks, in words."""
    from zo_lightning import __version__

    residency = optimizer.residency
    parameters = repr([(p.name, tuple(p.shape), p.tensor.dtype, p.group) for p in residency.trained])
    groups = [{name: group[name] for name in ("lr", "eps", "weight_decay")} for group in optimizer.param_groups]
    where = [str(getattr(p.aliases[0], "placements", "whole")) for p in residency.trained]
    same = {
        "the estimator": repr(optimizer.estimator),
        "the update rule": repr(optimizer.rule),
        "backprop": repr(optimizer.tail.backprop),
        "the noise": optimizer.noise.text,
        "the seed": str(optimizer.seed),
        "the count of steps": str(optimizer.steps),
        "weights=": residency.name,
        "the settings of groups": repr(groups),
        "the mask": repr(optimizer.masks.mask and optimizer.masks.mask.described()),
        "the mesh": str(optimizer.exchange.mesh),
        "the objective": type(optimizer.objective).__name__,
        "the list of parameters": hashlib.blake2b(parameters.encode(), digest_size=8).hexdigest(),
        "how parameters are sharded": hashlib.blake2b(repr(where).encode(), digest_size=8).hexdigest(),
        "zo_lightning": __version__,
        "torch": str(torch.__version__),
    }
    if not isinstance(residency, Offloaded) and not any_sharded(residency.trained):  # shards: ZOOptimizer._agree
        same["what the trained weights are"] = digest(p.tensor for p in residency.trained)
        same["what the frozen weights are"] = digest(_frozen(optimizer))
    return same


def check_mesh(optimizer: ZOOptimizer) -> None:
    """ValueError where these weights can't be trained by processes that evaluate different points."""
    mesh, residency = optimizer.exchange.mesh, optimizer.residency
    if mesh.size == mesh.data:
        return
    if any_sharded(residency.trained):
        raise ValueError(NOT_SHARDED.format(parallel=mesh))
    if optimizer.moves:
        raise ValueError(
            f'Invalid weights: "inplace" with parallel="{mesh}". Moves in place leave roundings, which would differ between processes '
            'that evaluate different points. Use weights="exact" or "copy".'
        )


def _frozen(optimizer: ZOOptimizer) -> Iterator[Tensor]:
    """Parameters that are not trained; of quantized ones what is inside."""
    trained = {id(alias) for p in optimizer.residency.trained for alias in (p.tensor, *p.aliases)}
    for parameter in () if optimizer.module is None else optimizer.module.parameters():
        if id(parameter) not in trained and not is_sharded(parameter):
            yield from plain(parameter)


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor, or those inside a wrapper of several; none for one without values."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    elif not tensor.is_meta and tensor.element_size() in _WORDS:
        yield tensor
