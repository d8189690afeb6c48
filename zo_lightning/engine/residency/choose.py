"""Which residency `weights=` means for a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from zo_lightning.engine.messages import choose, say_once
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.parameters import Trained, total_bytes
from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.residency.batched import Batched, Population
from zo_lightning.engine.residency.exact import Exact
from zo_lightning.engine.residency.gathered import residency_of_shards
from zo_lightning.engine.residency.inplace import InPlace
from zo_lightning.engine.residency.offloaded import Offload, Offloaded
from zo_lightning.engine.residency.scratch import Copy
from zo_lightning.engine.residency.units import Unit, compiled_part, is_compiled, repeated_blocks
from zo_lightning.engine.shards import fsdp_modules, is_sharded

SMALL_BYTES = 16 << 20
"""Trainable sets up to this size are copied whole."""

_UNKNOWN = "the module that gathers it must be known. Pass it as ZOOptimizer(model, ...) or module=model"

WEIGHTS: dict[str, object] = {"auto": None, "exact": Exact, "copy": Copy, "inplace": InPlace, "batched": Population}


def build_residency(
    weights: str | Offload | Batched, module: nn.Module | None, trained: Sequence[Trained], noise: Noise, before: Residency | None = None
) -> Residency:
    """The residency called `weights`; "auto" takes copy where little is trained, exact where there are blocks, else in place.

    `before` is the one whose place it takes. Raises ValueError for an unknown name, and for "exact" without a module.
    """
    sharded = next((p.name for p in trained if is_sharded(p.aliases[0])), None)
    if sharded is not None and (module is None or isinstance(weights, Offload)):
        what = f"weights={weights!r} streams whole tensors; shards rest on the CPU by fully_shard(offload_policy=CPUOffloadPolicy())"
        raise ValueError(f"Parameter {sharded!r} is sharded: {_UNKNOWN if module is None else what}.")
    if isinstance(weights, Offload):
        if module is None:
            raise ValueError(f"weights={weights!r} needs the model: pass it as ZOOptimizer(model, ...) or module=model.")
        return Offloaded(module, trained, noise, weights, before)
    members = weights.members if isinstance(weights, Batched) else None
    kind = Population if isinstance(weights, Batched) else choose("weights", weights, WEIGHTS, "an Offload or Batched")
    if kind is Population and sharded is not None:
        raise ValueError(f'Parameter {sharded!r} is sharded, and weights="batched" reads whole tensors. Use weights="exact".')
    if kind is Population:
        return Population(module, trained, noise, members)
    if sharded is not None and module is not None and fsdp_modules(module):
        return residency_of_shards(str(weights), module, trained, noise)
    if kind is None:
        return _auto(module, trained, noise)
    if kind is Exact:
        if module is None:
            raise ValueError('weights="exact" needs the model: pass it as ZOOptimizer(model, ...) or module=model, or use weights="copy".')
        exact = Exact(module, trained, noise)
        _say_what_compiled_modules_cost(module, exact.units)
        return exact
    return kind(module, trained, noise)  # type: ignore[operator,no-any-return]


def _auto(module: nn.Module | None, trained: Sequence[Trained], noise: Noise) -> Residency:
    size = sum(p.numel * p.tensor.element_size() for p in trained)
    whole = total_bytes(module.parameters()) if module is not None else size
    if size <= SMALL_BYTES or size * 20 <= whole:
        return Copy(module, trained, noise)
    if module is None:
        why = "the model is not known (pass ZOOptimizer(model, ...) or module=model)"
    elif compiled_part(module) is not None:
        why = "the model is compiled"
    elif not repeated_blocks(module):
        why = "the model has no repeated blocks (modules of one class, with submodules, in a ModuleList or the like)"
    else:
        return Exact(module, trained, noise)
    say_once("weights.auto", f'weights="auto" perturbs the weights in place, because {why}: they return up to rounding, not bit for bit.')
    return InPlace(module, trained, noise)


def _say_what_compiled_modules_cost(root: nn.Module, units: Sequence[Unit]) -> None:
    for unit in units:
        part = unit.module
        if part is not None and is_compiled(part) and (part is root or repeated_blocks(part)):
            megabytes = total_bytes(p.tensor for p in unit.parameters) / 1e6
            say_once(
                "exact.compiled",
                f'weights="exact" writes {megabytes:.1f} MB to scratch at once, all that is trained in a compiled module, for hooks '
                "inside it never run. Compile the blocks one by one (block.compile()) to need the memory of one block.",
            )
