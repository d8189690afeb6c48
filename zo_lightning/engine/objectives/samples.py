"""What an evaluation leaves behind: parts of samples, joined, kept until the update, and brought back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def without(index: int | None, preds: Any, target: Any) -> tuple[Any, Any]:
    """Predictions and integer targets where the target is not `index`; scores (..., classes) of several dimensions become (n, classes)."""
    both = isinstance(preds, Tensor) and isinstance(target, Tensor)
    if index is None or not both or target.is_floating_point() or not target.dim() or preds.shape[: target.dim()] != target.shape:
        return preds, target
    valid = target != index
    scores = preds.is_floating_point() and preds.dim() == target.dim() + 1
    if bool(valid.all()) and not (scores and target.dim() > 1):
        return preds, target
    return preds[valid], target[valid]


NUMPY = "numpy"
"""The key under which a sample holds an array, as a tensor: checkpoints are read without unpickling objects."""


def kept(value: Any) -> Any:
    """For a sample: tensors and arrays on the CPU, in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        return {NUMPY: torch.from_numpy(value.copy())} if value.dtype.kind in "biuf" and value.ndim else value.tolist()
    return value


def restored(sample: Any) -> Any:
    """The arrays of a sample again."""
    return tree_map(lambda part: part[NUMPY].numpy() if _is_array(part) else part, sample, is_leaf=_is_array)


def _is_array(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {NUMPY}


def is_empty(sample: tuple[Any, Any]) -> bool:
    """Whether nothing is left of it: all was padding."""
    return isinstance(sample[1], Tensor) and sample[1].numel() == 0


def joined(parts: Sequence[Any]) -> Any:
    """Micro-batches one after the other: tensors along the first dimension, lists as one list, also inside of tuples and mappings."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else torch.stack(list(parts))
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(own) for own in zip(*parts, strict=True))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return list(parts)


def number(value: Any, name: str) -> float:
    """The one real number that something is. ValueError otherwise."""
    if isinstance(value, Real):
        return float(value)
    if (
        hasattr(value, "item")
        and getattr(value, "size", None) is not None
        and (value.numel() if isinstance(value, Tensor) else value.size) == 1
    ):
        return float(value.item())
    raise ValueError(f"{name} must give one number, and gave {type(value).__name__}: {short(value)}.")


def short(value: Any) -> str:
    """Its repr in one line, for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def names_in(mapping: Mapping[Any, Any]) -> str:
    """Its keys, for messages."""
    return ", ".join(map(repr, mapping)) or "nothing"
