"""What a mask trains: by layer, and beside the mask before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.masks.plan import Mask
from zo_lightning.engine.masks.rules import block_of
from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.parameters import Trained

_CHUNK = 1 << 21
MANY = 64
"""With more layers than that, charts are of blocks."""


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
    """Of each layer, with masks that follow the weights taken at the weights as they are; of a sharded one the part that is here."""
    found = []
    for p in trained:
        count = both = 0
        for now, before in zip(_kept(masks, p), _kept(masks.before, p) if masks.before is not None else _kept(masks, p), strict=True):
            count += int(now.sum())
            both += int((now & before).sum())
        overlap = None if masks.before is None or not count else both / count
        found.append(Share(p.name, p.tensor.numel(), count, overlap))
    return found


def together(found: Sequence[Share]) -> list[Share]:
    """The layers of each repeated block as one."""
    groups: dict[str, list[Share]] = {}
    for share in found:
        groups.setdefault(block_of(share.name) or share.name, []).append(share)
    return [_sum(name, parts) for name, parts in groups.items()]


def _sum(name: str, parts: Sequence[Share]) -> Share:
    trained = sum(part.trained for part in parts)
    both = [part.overlap * part.trained for part in parts if part.overlap is not None]
    return Share(name, sum(part.numel for part in parts), trained, sum(both) / trained if both else None)


def charts(found: Sequence[Share], layers: bool | None) -> dict[str, float]:
    """`zo/mask/density` and `zo/mask/overlap` of all layers, and of each: see `SparseMask`."""
    if not found:
        return {}
    several = [] if layers is False else together(found) if layers is None and len(found) > MANY else found
    whole = _sum("", found)
    rows = {"density": {"": whole.density, **{f"/{share.name}": share.density for share in several}}}
    rows["overlap"] = {f"/{share.name}": share.overlap for share in several if share.overlap is not None}
    if whole.overlap is not None:
        rows["overlap"][""] = whole.overlap
    return {f"zo/mask/{kind}{name}": value for kind, row in rows.items() for name, value in row.items()}


def _kept(masks: Masks, p: Trained) -> Iterator[Tensor]:
    flat = p.tensor.detach().reshape(-1)
    mask = masks.of(p.key)
    for at in range(0, flat.numel(), _CHUNK):
        piece = flat[at : at + _CHUNK]
        if not masks.trains(p.key) or mask is None:
            yield torch.full(piece.shape, masks.trains(p.key), dtype=torch.bool, device=piece.device)
        else:
            yield mask.keep(piece, at) if p.region is None else mask.at(p.region.index_of(at, at + len(piece), flat.device), piece)


def table(mask: Mask, found: Sequence[Share]) -> str:
    """A line a layer: its name, weights, trained weights, share."""
    total, count = sum(share.numel for share in found), sum(share.trained for share in found)
    rows = [(share.name, f"{share.numel:,}", f"{share.trained:,}", f"{share.density:.2%}") for share in found]
    rows.append(("all", f"{total:,}", f"{count:,}", f"{count / max(1, total):.2%}"))
    heads = ("layer", "weights", "trained", "share")
    width = [max(len(row[i]) for row in [heads, *rows]) for i in range(4)]
    lines = ["  ".join([row[0].ljust(width[0]), *(row[i].rjust(width[i]) for i in range(1, 4))]) for row in [heads, *rows]]
    return "\n".join([f"Mask {mask.rule!r}", *lines])
