"""Fingerprints of weights: BLAKE2b over names, shapes, dtypes and bits. Equal where and only where every bit is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.parameters import Scale, Trained, canonical_names
from zo_lightning.engine.shards import is_sharded, local, whole
from zo_lightning.engine.trajectory.encoding import canonical

_PIECE = 1 << 22
"""Elements that are copied at a time (from a device, or of a tensor that is not contiguous)."""
_THREADS = min(4, os.cpu_count() or 1)  # hashlib releases the interpreter lock


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits; independent of the order, of strides and of the device. Sharded tensors are gathered, by all ranks."""
    names = sorted(tensors)
    if any(is_sharded(tensor) for tensor in tensors.values()):  # one after another, and in the same order everywhere
        digests = [_digest(whole(local(tensors[name]).detach(), tensors[name])) for name in names]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(_digest, [tensors[name] for name in names]))
    together = hashlib.blake2b(digest_size=32, person=b"zo.fingerprint")
    for name, digest in zip(names, digests, strict=True):
        together.update(canonical([name, list(tensors[name].shape), dtype_name(tensors[name].dtype), digest]) + b"\n")
    return together.hexdigest()


def trained_fingerprint(trained: Sequence[Trained]) -> str:
    """Of the trained weights; tied ones count once."""
    return fingerprint({p.name: p.aliases[0] if is_sharded(p.aliases[0]) else p.tensor for p in trained})


def frozen_fingerprint(module: nn.Module, trained: Sequence[Trained]) -> str:
    """Of everything else that a state dict of `module` has: frozen parameters and persistent buffers. Meta tensors by shape alone, of
    quantized weights what is inside and not trained.
    """
    aliases = {id(alias) for p in trained for alias in p.aliases} | {id(p.tensor) for p in trained}
    named: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                named.setdefault(f"{prefix}.{name}" if prefix else name, buffer)
    keys = canonical_names(list(named))
    kept = {key: tensor for key, tensor in zip(keys, named.values(), strict=True) if id(tensor) not in aliases}
    of_scales = {key for key, tensor in zip(keys, named.values(), strict=True) if isinstance(tensor, Scale) and id(tensor) in aliases}
    return fingerprint({name: part for key, tensor in kept.items() for name, part in _parts(key, tensor, of_scales)})


def _parts(name: str, tensor: Tensor, left_out: Set[str]) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the tensors inside a wrapper of several but those whose parameters are `left_out`."""
    if is_sharded(tensor) or not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        if f"{name}_{inner.strip('_')}" not in left_out:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner), left_out)


@torch.no_grad()
def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for piece in () if tensor.is_meta else _pieces(tensor.detach()):
        flat = piece.to("cpu").reshape(-1)
        if flat.stride(0) != 1:  # one element can have any stride and yet count as contiguous
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in logical order."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_PIECE)
    elif tensor.numel() <= _PIECE:
        yield tensor
    else:
        for row in tensor.split(max(1, _PIECE // max(1, tensor[0].numel()))) if tensor[0].numel() <= _PIECE else ():
            yield row
        for row in tensor if tensor[0].numel() > _PIECE else ():
            yield from _pieces(row)
