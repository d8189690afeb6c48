"""Single elements of a tensor, by their number in logical order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zo_lightning.engine.noise.sweep import Item


def located(item: Item, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of listed elements of a parameter: the numbers of those that the item has, and where it has them."""
    if item.region is None or item.places is not None:
        return index, index
    own, places = item.region.locate(index)
    return index[own], places


def put_moved(item: Item, places: Tensor, values: Tensor) -> None:
    """What a sweep gives for listed elements, into the item; its other elements become those of the base."""
    if item.places is not None:
        item.out.copy_(values)
        return
    if item.out is not item.base:
        item.out.copy_(item.base)
    put(item.out, places, values)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Elements by their number in logical order."""
    return tensor.view(-1)[index] if tensor.is_contiguous() else tensor[torch.unravel_index(index, tensor.shape)]


def put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write elements by their number in logical order."""
    where = (index.long(),) if tensor.is_contiguous() else torch.unravel_index(index.long(), tensor.shape)
    (tensor.view(-1) if tensor.is_contiguous() else tensor).index_put_(where, values.to(tensor.dtype))
