"""What a mask trains: by layer, and beside the mask before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.masks.plan import Mask
from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.parameters import Trained

_CHUNK = 1 << 21


class Share(NamedTuple):
    """Of one layer: how many of its weights are trained, and which share of these the mask before had trained (None: there was none)."""

    name: str
    numel: int
    trained: int
    overlap: float | None

    @property
    def density(self) -> float:
        """The share of the layer's weights that is trained."""
        return self.trained / max(1, self.numel)


def shares(masks: Masks, trained: Sequence[Trained]) -> list[Share]:
    """Of each layer, with masks that follow the weights taken at the weights as they are."""
    found = []
    for p in trained:
        count = both = 0
        for now, before in zip(_kept(masks, p), _kept(masks.before, p) if masks.before is not None else _kept(masks, p), strict=True):
            count += int(now.sum())
            both += int((now & before).sum())
        overlap = None if masks.before is None or not count else both / count
        found.append(Share(p.name, p.tensor.numel(), count, overlap))
    return found


def _kept(masks: Masks, p: Trained) -> Iterator[Tensor]:
    flat = p.tensor.detach().reshape(-1)
    mask = masks.of(p.key)
    for at in range(0, flat.numel(), _CHUNK):
        piece = flat[at : at + _CHUNK]
        if not masks.trains(p.key) or mask is None:
            yield torch.full(piece.shape, masks.trains(p.key), dtype=torch.bool, device=piece.device)
        else:
            yield mask.keep(piece, at)


def table(mask: Mask, found: Sequence[Share]) -> str:
    """A line a layer: its name, weights, trained weights, share."""
    total, count = sum(share.numel for share in found), sum(share.trained for share in found)
    rows = [(share.name, f"{share.numel:,}", f"{share.trained:,}", f"{share.density:.2%}") for share in found]
    rows.append(("all", f"{total:,}", f"{count:,}", f"{count / max(1, total):.2%}"))
    heads = ("layer", "weights", "trained", "share")
    width = [max(len(row[i]) for row in [heads, *rows]) for i in range(4)]
    lines = ["  ".join([row[0].ljust(width[0]), *(row[i].rjust(width[i]) for i in range(1, 4))]) for row in [heads, *rows]]
    return "\n".join([f"Mask {mask.rule!r}", *lines])
