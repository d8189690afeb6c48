"""What of an optimizer travels in checkpoints and copies: counters, safeguard, an unfinished window; plain types alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_lightning.engine.advice import NOT_SAVED_HERE
from zo_lightning.engine.masks import Masks
from zo_lightning.engine.options import check_group
from zo_lightning.engine.progress import Progress
from zo_lightning.engine.shards import is_sharded, part, whole

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

VERSION = 1
_COUNTERS = ("seed", "steps", "skipped_steps", "zero_difference_steps")

COPIED = (
    *("module", "noise", "_estimator", "weights", "seed", "rule", "progress", "safeguard", "max_nonfinite", "report"),
    *("masters", "masks", "objective", "tail"),
    *("_exchange", "_narrow", "_agreed", "_factors"),
    *("steps", "skipped_steps", "zero_difference_steps", "_nonfinite_run", "_zero_run", "_window"),
)
"""Attributes that a copy of an optimizer has, beside torch's own."""


def saved(optimizer: ZOOptimizer) -> dict[str, Any]:
    """The entry "zo" of `ZOOptimizer.state_dict()`."""
    window, safeguard, backprop = optimizer._window, optimizer.safeguard, optimizer.tail.state_dict()
    return {
        **({} if backprop is None else {"backprop": backprop}),
        "version": VERSION,
        **{name: getattr(optimizer, name) for name in _COUNTERS},
        "forward_passes": optimizer.forward_passes,
        "nonfinite_run": optimizer._nonfinite_run,
        "zero_run": optimizer._zero_run,
        "safeguard": None if safeguard is None else safeguard.state_dict(),
        "noise": optimizer.noise.text,
        "idle": optimizer._idle,
        "masters": _whole_masters(optimizer),
        "masks": optimizer.masks.state_dict(),
        "progress": optimizer.progress.state_dict(),
        "window": None if window is None else {**window.state_dict(), "of": _whose(optimizer)},
    }


def _whose(optimizer: ZOOptimizer) -> list[Any]:
    """Whose measurements an unfinished window has: the rank, and the mesh of all."""
    return [optimizer.exchange.rank, str(optimizer.exchange.mesh)]


def of_all_ranks(state_dict: dict[str, Any], windows: list[Any]) -> dict[str, Any]:
    """A state that all ranks can go on from: with the unfinished window of each, its `state_dict()["zo"]["window"]`, in their order."""
    windows = [] if all(window is None for window in windows) else windows
    return {**state_dict, "zo": {**state_dict["zo"], "window": {"ranks": windows} if windows else None}}


def _own_window(optimizer: ZOOptimizer, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a saved window what this rank had measured; ValueError where another one had, or other ranks shared the work."""
    if saved is None:
        return None
    rank, ranks = optimizer.exchange.rank, saved.get("ranks")
    if ranks is None:
        own = saved
    elif len(ranks) == optimizer.exchange.world_size:
        own = ranks[rank]
    else:
        own = next(window for window in ranks if window is not None)
    if own is None:
        return None
    of = own.get("of", [0, "data=1"])
    if of != _whose(optimizer):
        raise ValueError(
            f'The state was saved inside an accumulation window, by rank {of[0]} with parallel="{of[1]}", and here is rank {rank} with '
            f'"{optimizer.exchange.mesh}". Each rank has measured other values: resume with the same processes, each from its own state '
            "(Lightning's checkpoints have those of all), or from a state saved between two steps."
        )
    return dict(own)


def _whole_masters(optimizer: ZOOptimizer) -> dict[str, Tensor]:
    """Those of whole parameters, the same on all ranks."""
    masters = optimizer.masters.state_dict()
    sharded = {str(p.key): p.aliases[0] for p in optimizer._trained() if is_sharded(p.aliases[0])} if masters else {}
    return {key: whole(master, sharded[key]) if key in sharded else master for key, master in sorted(masters.items())}


def _own_masters(optimizer: ZOOptimizer, masters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of whole masters the parts that are here."""
    sharded = {str(p.key): p for p in optimizer._trained() if p.region is not None} if masters else {}
    return {
        key: part(master, sharded[key].region).view(sharded[key].tensor.shape) if key in sharded else master
        for key, master in masters.items()
    }


def check(optimizer: ZOOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The entry "zo" of a state; ValueError, with nothing changed, where it is not one for this optimizer."""
    zo: dict[str, Any] | None = state_dict.get("zo")
    if zo is None:
        raise ValueError(NOT_SAVED_HERE)
    optimizer.tail.check_state(zo.get("backprop"))
    if zo.get("version") != VERSION or zo.keys() != saved(optimizer).keys():
        raise ValueError(f"The state has version {zo.get('version')} or is incomplete; this release reads version {VERSION}.")
    if zo["noise"] != optimizer.noise.text:
        raise ValueError(f"noise={optimizer.noise.text!r}, but the state was saved with noise={zo['noise']!r}. Resume with the same noise.")
    progress = Progress(optimizer.estimator, optimizer.rule)
    progress.load_state_dict(zo["progress"])
    there, here = zo["masks"]["mask"], optimizer.masks.mask
    if there != (None if here is None else here.described()):
        before, now = ("no mask" if mask is None else f"the mask {mask}" for mask in (there, None if here is None else here.described()))
        raise ValueError(f"The state was saved with {before}, and here is {now}. Resume with the same mask.")
    for group in state_dict["param_groups"]:
        check_group(group)
    own = _own_window(optimizer, zo["window"])
    if own is not None:
        optimizer._new_window(_masks_of(optimizer, zo), progress).load_state_dict(own)
    return {**zo, "window": own}


def _masks_of(optimizer: ZOOptimizer, zo: dict[str, Any]) -> Masks:
    """Those that a state has."""
    masks = Masks(optimizer.masks.mask)
    masks.load_state_dict(zo["masks"], _devices(optimizer))
    return masks


def _devices(optimizer: ZOOptimizer) -> dict[int, torch.device]:
    return {p.key: p.tensor.device for p in optimizer._trained()}


def load(optimizer: ZOOptimizer, zo: dict[str, Any]) -> None:
    """Take over what `check` returned."""
    for name in _COUNTERS:
        setattr(optimizer, name, zo[name])
    optimizer._nonfinite_run, optimizer._zero_run = zo["nonfinite_run"], zo["zero_run"]
    optimizer._evaluator.count, optimizer._idle = zo["forward_passes"], zo["idle"]
    optimizer.masters.load_state_dict(_own_masters(optimizer, zo["masters"]))
    optimizer.tail.load_state_dict(zo.get("backprop"))
    optimizer.masks.load_state_dict(zo["masks"], _devices(optimizer))
    optimizer.progress.load_state_dict(zo["progress"])
    optimizer.journal.loaded()
    if optimizer.safeguard is not None and zo["safeguard"] is not None:
        optimizer.safeguard.load_state_dict(zo["safeguard"])
    optimizer._window = None if zo["window"] is None else optimizer._new_window()
    if optimizer._window is not None:
        optimizer._window.load_state_dict(zo["window"])
