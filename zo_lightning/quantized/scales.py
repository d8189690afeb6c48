"""Training the scales of quantized weights alone (QZO): the integers stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_lightning.engine.parameters import Scale
from zo_lightning.engine.trajectory.weights import load_base, save_tensors
from zo_lightning.quantized.formats import Format, format_of

FLOOR = 1e-7
"""No update takes a scale below it (QZO, arXiv 2505.13430)."""


class Found(NamedTuple):
    """A scale or zero point in a model."""

    module: nn.Module
    format: Format
    prefix: str
    name: str
    tensor: Tensor
    is_scale: bool

    @property
    def full(self) -> str:
        """The name of its parameter in the model."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name


def train_scales(model: nn.Module, *, zero_points: bool = False, also: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    r"""Make the scales of a quantized model its trained parameters, and freeze everything else; their names.

    A quantized weight is w = s q (less a zero point), with integers q and one scale s for a row or group of them. Evaluations are at
    s + eps u z and updates are s <- max(1e-7, s - lr g u z) (QZO, arXiv 2505.13430), with u the power of two nearest to the layer's mean
    scale: eps and lr are relative to it, so that layers, bits and group sizes can share them. q is never touched. Each scale becomes a
    parameter of its module, `weight_scale` beside `weight`, of the shape and dtype that it has.

    Works on layers of torchao (weight-only int8 and int4) and quanto, bitsandbytes (nf4, fp4, int8), GPTQ and AWQ. A model whose scales are
    parameters already may be given again, with other options.

    Args:
        zero_points: train them too, where they are floating point numbers.
        also: patterns of names of parameters that are not quantized and are to be trained as well: `["classifier*"]`, `["*"]`.
        exclude: patterns of names of scales that stay as they are.

    Raises ValueError for a model without quantized layers, for scales that are not positive and finite, and for a pattern that matches no
    name.
    """
    found = [one for one in scales_of(model) if one.is_scale or zero_points]
    if not found:
        raise ValueError(
            f"train_scales: {type(model).__name__} has no quantized layers. Quantize it first, for instance with torchao's "
            "quantize_(model, Int8WeightOnlyConfig())."
        )
    chosen = [one for one in found if not _matches(one.full, exclude)]
    rest = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and name not in {one.full for one in found}]
    _check_patterns("exclude", exclude, [one.full for one in found])
    _check_patterns("also", also, [name for name, _ in rest])
    for one in chosen:
        _check_values(one)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tied: dict[int, Scale] = {}
    for one in chosen:
        _attach(one, tied)
    for name, parameter in rest:
        if _matches(name, also):
            parameter.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def scales_of(model: nn.Module) -> Iterator[Found]:
    """The scales and floating point zero points of all quantized layers, trained or not."""
    for prefix, module in model.named_modules():
        kind = format_of(module)
        if kind is not None:
            for parts, is_scale in ((kind.scales(module), True), (kind.zero_points(module), False)):
                for name, tensor in parts.items():
                    yield Found(module, kind, prefix, name, tensor, is_scale)


def save_scales(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all scales and floating point zero points, and whatever else is trained, as one safetensors file: a small part of the model.

    ValueError for a model without quantized layers, OSError where the file can't be written.
    """
    tensors = {one.full: one.tensor for one in scales_of(model)}
    if not tensors:
        raise ValueError(f"save_scales: {type(model).__name__} has no quantized layers.")
    save_tensors(path, tensors | {name: p for name, p in model.named_parameters() if p.requires_grad})


@torch.no_grad()
def load_scales(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a model that was quantized in the same way what `save_scales` wrote; nothing changes where anything does not fit.

    ValueError where the file is damaged, or names, shapes or dtypes differ; OSError where it can't be read.
    """
    tensors = load_base(path, advice="save_scales(model, path) writes such files.")
    found = {one.full: one.tensor for one in scales_of(model)}
    goals = dict(model.named_parameters()) | found
    lacking = sorted({*(tensors.keys() - goals.keys()), *(found.keys() - tensors.keys())})
    if lacking:
        where = "the model" if lacking[0] in found else "the file"
        raise ValueError(f"{path}: {lacking[0]!r} is in {where} alone; {len(lacking)} names differ. Quantize the model as it was.")
    for name, tensor in tensors.items():
        for what, here, there in (("shape", tuple(goals[name].shape), tuple(tensor.shape)), ("dtype", goals[name].dtype, tensor.dtype)):
            if here != there:
                raise ValueError(f"{path}: {name!r} has {what} {there} there and {here} in the model. Quantize the model as it was.")
    for name, tensor in tensors.items():
        goals[name].copy_(tensor)


def release_scales(model: nn.Module) -> None:
    """Make the model what its package made it, with the scales that it has now: no parameters of ours, all frozen but what was trained
    beside them. `save_pretrained`, and whatever else knows the package, then work as before.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Binding):
                for name in hook.names:
                    parameter = module._parameters.pop(name)
                    if parameter is not None:
                        hook.format.release(module, name, parameter.detach())
                del module._forward_pre_hooks[key]
        for key, hook in list(module._state_dict_pre_hooks.items()):
            if isinstance(hook, Binding):
                del module._state_dict_pre_hooks[key]


def has_scales(model: nn.Module) -> bool:
    """Whether scales of the model are its parameters."""
    return any(isinstance(hook, Binding) for module in model.modules() for hook in module._forward_pre_hooks.values())


def _attach(one: Found, tied: dict[int, Scale]) -> None:
    """Make it a parameter of its module, which the module computes with; the same one where modules share a weight."""
    parameter = one.module._parameters.get(one.name)
    if not isinstance(parameter, Scale):
        parameter = tied.get(id(one.tensor))
        if parameter is None:
            parameter = tied[id(one.tensor)] = _scale(one)
        one.module._buffers.pop(one.name, None)
        one.module.register_parameter(one.name, parameter)
        binding = next((hook for hook in one.module._forward_pre_hooks.values() if isinstance(hook, Binding)), None)
        if binding is None:
            binding = Binding(one.format)
            one.module.register_forward_pre_hook(binding)
            one.module.register_state_dict_pre_hook(binding)
        binding.names.append(one.name)
    parameter.requires_grad_(True)
    one.format.put(one.module, one.name, parameter)


class Binding:
    """Before every forward pass, and before it is saved: the module has its parameters, also after it was copied, moved or loaded."""

    def __init__(self, kind: Format) -> None:
        self.format, self.names = kind, list[str]()

    def __call__(self, module: nn.Module, *args: Any) -> None:
        for name in self.names:
            parameter = module._parameters[name]
            if not isinstance(parameter, Scale):
                raise RuntimeError(
                    f"{name!r} of {type(module).__name__} was replaced by a {type(parameter).__name__} (load_state_dict(assign=True)?). "
                    "Call train_scales(model) again."
                )
            self.format.put(module, name, parameter)


def _scale(one: Found) -> Scale:
    least = min(FLOOR, float(one.tensor.min())) if one.is_scale else None
    return Scale(one.tensor.detach().contiguous(), True, _unit(one), least)


def _unit(one: Found) -> float:
    mean = float(one.tensor.detach().double().abs().mean())
    if mean == 0:  # zero points of a symmetric quantization: as large as a step of the scale
        mean = float(next(iter(one.format.scales(one.module).values())).detach().double().abs().mean())
    return 2.0 ** round(math.log2(mean))


def _check_values(one: Found) -> None:
    values = one.tensor.detach()
    wrong = ~values.isfinite() if not one.is_scale else ~(values.isfinite() & (values > 0))
    if wrong.any():
        allowed = "finite and above 0" if one.is_scale else "finite"
        raise ValueError(
            f"{one.full!r}: {int(wrong.sum())} of {values.numel()} values are not {allowed}. Quantize the model anew, or leave it out with "
            f"exclude=[{one.full!r}]."
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise ValueError(f"Invalid {option}: {patterns!r}. It is a list of patterns: [{patterns!r}].")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"Invalid {option}: {pattern!r} matches none of {', '.join(map(repr, names[:3]))}, ...")
