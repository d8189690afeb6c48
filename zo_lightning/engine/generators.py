"""The states of the generators that the order of the data is drawn from, in a form that checkpoints keep."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

Random = dict[str, Any]


def generator_states(loaders: list[Any]) -> Random:
    """The states of the global generators and of those of the loaders, as tensors and plain types."""
    version, words, gauss = random.getstate()
    state: Random = {
        "torch": torch.random.get_rng_state(),
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "loaders": [generator.get_state() for generator in _generators(loaders)],
    }
    if "numpy" in sys.modules:
        kind, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = [str(kind), torch.tensor(keys.astype("int64")), int(position), int(has_gauss), float(cached)]
    return state


def set_generator_states(state: Random | None, loaders: list[Any]) -> None:
    """Put generators back to what `generator_states` returned."""
    if state is None:
        return
    torch.random.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    set_loader_states(state["loaders"], loaders)
    if "numpy" in state and "numpy" in sys.modules:
        kind, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, keys.numpy().astype("uint32"), *rest))


def set_loader_states(states: list[torch.Tensor], loaders: list[Any]) -> None:
    """Put back the generators of the loaders alone."""
    for generator, saved in zip(_generators(loaders), states, strict=False):
        generator.set_state(saved)


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    """The generators that users gave to loaders, samplers and datasets, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        sampler, outer = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        inner = getattr(outer, "batch_sampler", None)  # of accelerate's shard of a batch sampler
        deepest = (getattr(outer, "sampler", None), inner, getattr(inner, "sampler", None))
        for owner in (loader, sampler, outer, *deepest, getattr(loader, "dataset", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())
