"""Masks as whole tensors, and what their tests compare them with."""

from __future__ import annotations

import random

import numpy as np
import torch
from reference.masks import by_size
from torch import Tensor

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.parameters import collect

Weights = dict[str, Tensor]


def masks_of(optimizer: ZOOptimizer) -> Weights:
    """The mask at hand, as whole tensors."""
    found = {}
    for p in collect(optimizer.param_groups, optimizer._names):
        mask, kept = optimizer.masks.of(p.key), torch.full(p.tensor.shape, optimizer.masks.trains(p.key))
        found[p.name] = kept if mask is None else mask.keep(p.tensor.detach().reshape(-1), 0).view(p.tensor.shape)
    return found


def top_of(scores: Weights, density: float) -> Weights:
    """The largest absolute scores of each layer, by sorting; among equal ones the first."""
    return {name: by_size(score, round(density * score.numel()), True)(score) for name, score in scores.items()}


def generators(seed: int | None = None) -> str:
    """The states of the global generators, seeded first where there is a seed."""
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    return str((torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))
