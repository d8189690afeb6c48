"""The tensors that a log's parameters are in a model, an optimizer or a plain table of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from zo_lightning.engine.noise import NOISES, Basis, Noise, as_noise
from zo_lightning.engine.parameters import Trained, canonical_names, collect, names_of
from zo_lightning.engine.seeds import parameter_key
from zo_lightning.engine.shards import is_sharded
from zo_lightning.engine.trajectory.fingerprint import dtype_name
from zo_lightning.engine.trajectory.records import Segment

if TYPE_CHECKING:  # the optimizer may import the records of its steps
    from zo_lightning.engine.optimizer import ZOOptimizer

Target: TypeAlias = "nn.Module | ZOOptimizer | Mapping[str, Tensor]"
"""Weights to replay on."""


def as_optimizer(target: Target) -> ZOOptimizer | None:
    """The target if it is a ZOOptimizer."""
    from zo_lightning.engine.optimizer import ZOOptimizer

    return target if isinstance(target, ZOOptimizer) else None


def module_of(target: Target) -> nn.Module | None:
    """The module around the weights, where it is known."""
    optimizer = as_optimizer(target)
    if optimizer is not None:
        return optimizer.module
    return target if isinstance(target, nn.Module) else None


def match(target: Target, segment: Segment) -> list[Trained]:
    """One `Trained` for each parameter of the segment, in its order.

    Raises ValueError that names the parameter where one is missing or differs in shape or dtype, and where an optimizer trains others too.
    """
    wanted = [entry.name for entry in segment.parameters]
    tensors = _tensors(target, wanted)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(
            f"Parameter {missing[0]!r} of the step log is not in the model (nor are {len(missing) - 1} others); the model has "
            f"{', '.join(map(repr, list(tensors)[:3]))}, ... Build the model that was trained, adapters included."
        )
    if as_optimizer(target) is not None:
        others = sorted(set(tensors) - set(wanted))
        if others:
            raise ValueError(f"Parameter {others[0]!r} is trained here, but not in the step log. Freeze it, or begin a new log.")
    trained = []
    for entry in segment.parameters:
        tensor = tensors[entry.name]
        if is_sharded(tensor):
            raise ValueError(f"Parameter {entry.name!r} is sharded. Replay the step log in a model that is not, and shard that one then.")
        for what, here, there in (("shape", tuple(tensor.shape), entry.shape), ("dtype", dtype_name(tensor.dtype), entry.dtype)):
            if here != there:
                raise ValueError(f"Parameter {entry.name!r} has {what} {here} here and {there} in the step log. Load the model as it was.")
        if tensor.is_meta:
            raise ValueError(f"Parameter {entry.name!r} is on the meta device, so it has no values. Load the weights first.")
        trained.append(Trained(entry.name, parameter_key(entry.name), tensor.detach(), entry.group, (tensor,), entry.unit, entry.least))
    return trained


def _tensors(target: Target, wanted: list[str]) -> dict[str, Tensor]:
    optimizer = as_optimizer(target)
    if optimizer is not None:
        return {p.name: p.aliases[0] for p in collect(optimizer.param_groups, optimizer._names)}
    if isinstance(target, nn.Module):
        names = names_of(target)
        return {names[id(parameter)]: parameter for parameter in target.parameters()}
    if isinstance(target, Mapping):
        if all(name in target for name in wanted):
            return dict(target)
        return dict(zip(canonical_names(list(target)), target.values(), strict=True))
    raise TypeError(f"Weights to replay on must be a module, a ZOOptimizer or a table of tensors, not {type(target).__name__}.")


def noise_of(target: Target, segment: Segment) -> Noise:
    """The noise that the log names. ValueError where nobody knows it."""
    optimizer = as_optimizer(target)
    if optimizer is not None and optimizer.noise.text == segment.noise:
        return optimizer.noise
    if segment.noise == Basis.name:  # no choice of a user's: the estimator brings it along
        return Basis()
    try:
        return as_noise(segment.noise)
    except ValueError as error:
        raise ValueError(f"noise={segment.noise!r} of the step log is not known here. Known: {', '.join(map(repr, NOISES))}.") from error
