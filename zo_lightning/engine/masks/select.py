"""The k smallest or largest elements of a tensor, exactly, ties broken by their number, in memory that does not grow with the tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from zo_lightning.engine.noise.members import Band, Lot

_CHUNK = 1 << 20
_DIGIT = 16
_SIZES = {
    torch.float16: (torch.int16, 15),
    torch.bfloat16: (torch.int16, 15),
    torch.float32: (torch.int32, 31),
    torch.float64: (torch.int64, 63),
}
"""An absolute value's bits, read as an integer, are in the order of the values; how many there are."""

Pieces = Callable[[], Iterator[Tensor]]
"""Makes an iterator over the int64 keys, >= 0, of consecutive elements."""


def kth_smallest(pieces: Pieces, bits: int, k: int) -> tuple[int, int]:
    """(the k-th smallest key, k >= 1, and how many of the k smallest are equal to it), by digits of 16 bits from the highest down."""
    found, shift = 0, -(-bits // _DIGIT) * _DIGIT
    while shift:
        shift -= _DIGIT
        counts: Tensor | None = None
        for keys in pieces():
            here = keys[(keys >> (shift + _DIGIT)) == found]
            more = torch.bincount((here >> shift) & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)
            counts = more if counts is None else counts.add_(more)
        below = (torch.zeros(0) if counts is None else counts).cumsum(0)
        digit = int(torch.searchsorted(below, k))
        k -= int(below[digit - 1]) if digit else 0
        found = (found << _DIGIT) | digit
    return found, k


def band(theta: Tensor, count: int, largest: bool = False) -> Band:
    """The `count` elements of smallest (largest) absolute value, 1 <= count <= numel; among equal ones those that come first."""
    integer, bits = _SIZES[theta.dtype]
    flat = theta.detach().reshape(-1)

    def keys() -> Iterator[Tensor]:
        for piece in flat.split(_CHUNK):
            yield piece.abs().view(integer).long()

    total = flat.numel()
    key, ties = kth_smallest(keys, bits, total - count + 1 if largest else count)
    if largest:
        ties = count - sum(int((piece > key).sum()) for piece in keys())
    bound = torch.tensor(key).to(integer).view(theta.dtype).item()
    split = ties < sum(int((piece == key).sum()) for piece in keys())
    return Band(bound, _place_of(keys(), key, ties) if split else total - 1, theta.dtype, largest)


def _place_of(pieces: Iterator[Tensor], key: int, number: int) -> int:
    """The place of the element that is the `number`-th one equal to `key`."""
    start = 0
    for piece in pieces:
        equal = torch.nonzero(piece == key).reshape(-1)
        if number <= len(equal):
            return start + int(equal[number - 1])
        number -= len(equal)
        start += len(piece)
    raise ValueError(f"There are not enough elements equal to {key}.")


def lot(seed: int, key: int, like: Tensor, count: int) -> Lot:
    """`count` elements by chance, as far as the lots differ: of 2**25 values some are drawn twice."""
    every, total = Lot(seed, key, 0.5), like.numel()

    def keys() -> Iterator[Tensor]:
        for start in range(0, total, _CHUNK):
            yield ((every.lots(start, min(_CHUNK, total - start), like.device).double() + 0.5) * 2.0**25).long()

    found, _ = kth_smallest(keys, 26, count)
    return Lot(seed, key, found * 2.0**-25 - 0.5)


def counts_of_all(tensors: Sequence[Tensor], count: int, largest: bool) -> list[int]:
    """How many of the `count` smallest (largest) absolute values of all tensors are in each; among equal ones those of earlier tensors."""

    def keys_of(tensor: Tensor) -> Iterator[Tensor]:
        for piece in tensor.detach().reshape(-1).split(_CHUNK):
            yield piece.abs().float().view(torch.int32).long()

    def every() -> Iterator[Tensor]:
        for tensor in tensors:
            yield from keys_of(tensor)

    total = sum(tensor.numel() for tensor in tensors)
    key, _ = kth_smallest(every, 31, total - count + 1 if largest else count)
    inside = [sum(int((k > key if largest else k < key).sum()) for k in keys_of(tensor)) for tensor in tensors]
    ties = count - sum(inside)
    for i, tensor in enumerate(tensors):
        more = min(ties, sum(int((k == key).sum()) for k in keys_of(tensor)))
        inside[i], ties = inside[i] + more, ties - more
    return inside
