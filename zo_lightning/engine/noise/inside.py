"""What a compiled kernel is told of a mask: which of its elements move, from tensors that cost it next to nothing to read.

A kernel works on blocks of 64 elements, of shape (n, 2, 32), those of one hash. Bools, 8-bit words and 64-bit indices are not vectorized by
torch's compiler for CPUs: a mask that is stored as bools would cost ten times as much as the step itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from zo_lightning.engine.noise.compiling import kernel
from zo_lightning.engine.noise.dither import BLOCK, Dithers

if TYPE_CHECKING:
    from zo_lightning.engine.noise.members import Members


class Inside(Protocol):
    """One of the classes below."""

    def of(self, wide: Tensor) -> Tensor:
        """bool of the shape of `wide`, the weights before the step in the dtype of the arithmetic."""


class Bounds(NamedTuple):
    """low <= |theta| <= high, for `edges` = (low, high)."""

    edges: Tensor

    def of(self, wide: Tensor) -> Tensor:
        size = wide.abs()
        return (size >= self.edges[0]) & (size <= self.edges[1])


class Ties(NamedTuple):
    """low < |theta| < high, or |theta| = edge up to some element, for `edges` = (low, high, edge).

    `limit`, of shape (n,), is the last lane of each block that counts there: -1 for none, 63 or more for all.
    """

    edges: Tensor
    limit: Tensor
    lane: Tensor

    def of(self, wide: Tensor) -> Tensor:
        size = wide.abs()
        ties = (size == self.edges[2]) & (self.lane <= self.limit[:, None, None])
        return ((size > self.edges[0]) & (size < self.edges[1])) | ties


class Words(NamedTuple):
    """Stored bits: int32 words of shape (n, 2), bit l of words[i, h] for element (i, h, l)."""

    words: Tensor

    def of(self, wide: Tensor) -> Tensor:
        return bits_of(self.words)


class Lots(NamedTuple):
    """u <= cut, u the dither."""

    dithers: Dithers
    cut: Tensor

    def of(self, wide: Tensor) -> Tensor:
        return self.dithers.values() <= self.cut


class Plain(NamedTuple):
    """A bool for every element."""

    keep: Tensor

    def of(self, wide: Tensor) -> Tensor:
        return self.keep


def bits_of(words: Tensor) -> Tensor:
    """(n, 2, 32) bools from int32 words (n, 2)."""
    bits = torch.ones((), dtype=torch.int32, device=words.device) << torch.arange(32, dtype=torch.int32, device=words.device)
    return (words[:, :, None] & bits) != 0


def chosen(inside: Inside | None, wide: Tensor, moved: Tensor, otherwise: Tensor | float) -> Tensor:
    """`moved` inside the mask, `otherwise` outside of it."""
    return moved if inside is None else torch.where(inside.of(wide), moved, otherwise)


@kernel
def _choose_blocks(out: Tensor, base: Tensor, moved: Tensor, inside: Inside) -> None:
    wide = base.to(moved.dtype)
    out.copy_(chosen(inside, wide, moved, wide))


@kernel
def _choose_blocks_(weights: Tensor, moved: Tensor, inside: Inside) -> None:
    wide = weights.to(moved.dtype)
    weights.copy_(chosen(inside, wide, moved, wide))


def choose_into(out: Tensor, base: Tensor, moved: Tensor, mask: Members, start: int) -> None:
    """out <- `moved` inside the mask, `base` outside; flat, `out` may have the memory of `base`, `start` is a multiple of 64."""
    whole = base.numel() // BLOCK * BLOCK
    rest = None if whole == base.numel() else torch.where(mask.keep(base[whole:], start + whole), moved[whole:], base[whole:])
    if whole:
        target, given = out[:whole].view(-1, 2, 32), moved[:whole].view(-1, 2, 32)
        inside = mask.inside(base[:whole], start)
        if out.data_ptr() == base.data_ptr():
            _choose_blocks_(target, given, inside)
        else:
            _choose_blocks(target, base[:whole].view(-1, 2, 32), given, inside)
    if rest is not None:
        out[whole:] = rest
