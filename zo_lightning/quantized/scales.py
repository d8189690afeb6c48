"""Training the scales of quantized weights alone (QZO): the integers stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Scale
from zo_lightning.engine.trajectory.weights import load_base, save_tensors
from zo_lightning.quantized.formats import Format, format_of

FLOOR = 1e-7
"""No update takes a scale below it (QZO, arXiv 2505.13430), nor below the smallest that there is."""


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
    s + eps u z and updates are s <- max(least, s - lr g u z) (QZO, arXiv 2505.13430), with u the power of two nearest to the layer's mean
    scale: eps and lr are relative to it, so that layers, bits and group sizes can share them. `least` is 1e-7, or the layer's smallest
    scale where that is less. q is never touched. Each scale becomes a parameter of its module, `weight_scale` beside `weight`, of the shape
    and dtype that it has.

    Works on layers of torchao (weight-only int8 and int4) and quanto, bitsandbytes (nf4, fp4, int8), GPTQ and AWQ. A model whose scales are
    parameters already may be given again, with other options, or after weights were replaced.

    Args:
        zero_points: train them too, where they are floating point numbers.
        also: patterns of names of parameters that are not quantized and are to be trained as well: `["classifier*"]`, `["*"]`.
        exclude: patterns of names of scales that stay as they are.

    Raises ValueError for a model without quantized layers, for scales that are not positive and finite, and for a pattern that matches no
    name.
    """
    _forget_replaced(model)
    found = [one for one in scales_of(model) if one.is_scale or zero_points]
    unknown = _unknown(model)
    if not found:
        what = f"quantized layers that are known here ({unknown} is not)" if unknown else "quantized layers"
        raise ValueError(
            f"train_scales: {type(model).__name__} has no {what}. Quantize it first, for instance with torchao's "
            "quantize_(model, Int8WeightOnlyConfig())."
        )
    chosen = [one for one in found if not _matches(one.full, exclude)]
    rest = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and not isinstance(p, Scale)]
    rest = [(name, p) for name, p in rest if not is_traceable_wrapper_subclass(p)]
    _check_patterns("exclude", exclude, [one.full for one in found])
    _check_patterns("also", also, [name for name, _ in rest])
    for one in chosen:
        _check_values(one)
    if unknown:
        say_once(
            f"quantized.{unknown}", f"train_scales: weights that are a {unknown} have no scales that are known here, and stay as they are."
        )
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
    """The scales and floating point zero points of all quantized layers, trained or not; parameters where they are parameters."""
    for prefix, module in model.named_modules():
        kind = format_of(module)
        if kind is not None:
            for parts, is_scale in ((kind.scales(module), True), (kind.zero_points(module), False)):
                for name, tensor in parts.items():
                    own = module._parameters.get(name)
                    yield Found(module, kind, prefix, name, own if isinstance(own, Scale) else tensor, is_scale)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same by name, those that modules share once."""
    found: dict[int, Found] = {}
    for one in scales_of(model):
        found.setdefault(id(one.tensor), one)
    return {one.full: one.tensor for one in found.values()}


def save_scales(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all scales and floating point zero points, and whatever else is trained, as one safetensors file: a small part of the model.

    ValueError for a model without quantized layers, OSError where the file can't be written.
    """
    tensors = _tensors(model)
    if not tensors:
        raise ValueError(f"save_scales: {type(model).__name__} has no quantized layers.")
    save_tensors(path, tensors | {name: p for name, p in model.named_parameters() if p.requires_grad})


@torch.no_grad()
def load_scales(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a model that was quantized in the same way what `save_scales` wrote; nothing changes where anything does not fit.

    Who goes on training calls `train_scales` first, so that u is that of the model before it was trained. ValueError where the file is
    damaged, or names, shapes or dtypes differ; OSError where it can't be read.
    """
    tensors = load_base(path, advice="save_scales(model, path) writes such files.")
    found = _tensors(model)
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
    """Make the model what its package made it, with the scales that it has now: no parameters of ours. `save_pretrained`, and whatever else
    knows the package, then work as before. `train_scales` makes the same parameters of them again, so that an optimizer may go on.
    """
    for module in model.modules():
        binding = _binding(module)
        if binding is not None:
            binding.remove(module)


def has_scales(model: nn.Module) -> bool:
    """Whether scales of the model are trained."""
    return any(isinstance(parameter, Scale) and parameter.requires_grad for parameter in model.parameters())


class Binding:
    """Before every forward pass, and before it is saved: the module has its parameters, also after it was copied, moved or loaded."""

    def __init__(self, kind: Format) -> None:
        self.format = kind
        self.holders: dict[str, object] = {}
        """By the name of a parameter what had it when it was bound."""

    def intact(self, module: nn.Module, name: str) -> bool:
        """Whether the parameter is a scale still, and of the weight that it was made for."""
        return isinstance(module._parameters.get(name), Scale) and self.format.holder(module, name) is self.holders[name]

    def __call__(self, module: nn.Module, *args: Any) -> None:
        for name in self.holders:
            parameter = module._parameters[name]
            if parameter is None or not self.intact(module, name):
                what = "its weight" if isinstance(parameter, Scale) else "it"
                raise RuntimeError(
                    f"{name!r} of {type(module).__name__} is not what is trained any more: {what} was replaced (a merged adapter, another "
                    "quantization, load_state_dict(assign=True)). Call train_scales(model) again, and make a new optimizer."
                )
            self.format.put(module, name, parameter)

    def remove(self, module: nn.Module) -> None:
        """Let the module compute without parameters of ours, which it keeps for another time."""
        for name in list(self.holders):
            parameter = module._parameters[name] if self.intact(module, name) else None
            self.forget(module, name)
            if isinstance(parameter, Scale):
                self.format.release(module, name, parameter.detach())
                vars(module).setdefault(_RELEASED, {})[name] = parameter

    def forget(self, module: nn.Module, name: str) -> None:
        """The parameter is gone."""
        module._parameters.pop(name, None)
        del self.holders[name]
        for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks) if not self.holders else ():
            for key, hook in list(hooks.items()):
                if hook is self:
                    del hooks[key]


_RELEASED = "_zo_released"


def _binding(module: nn.Module) -> Binding | None:
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Binding)), None)


def _forget_replaced(model: nn.Module) -> None:
    for module in model.modules():
        binding = _binding(module)
        if binding is not None:
            for name in [name for name in binding.holders if not binding.intact(module, name)]:
                binding.forget(module, name)


def _attach(one: Found, tied: dict[int, Scale]) -> None:
    """Make it a parameter of its module, which the module computes with; the same one where modules share a weight."""
    parameter: Tensor = one.tensor
    if not isinstance(parameter, Scale):
        if id(one.tensor) not in tied:
            before = _released(one)
            tied[id(one.tensor)] = _scale(one) if before is None else before
        parameter = tied[id(one.tensor)]
        one.module._buffers.pop(one.name, None)
        one.module.register_parameter(one.name, parameter)
        binding = _binding(one.module)
        if binding is None:
            binding = Binding(one.format)
            one.module.register_forward_pre_hook(binding)
            one.module.register_state_dict_pre_hook(binding)
        binding.holders[one.name] = one.format.holder(one.module, one.name)
    parameter.requires_grad_(True)
    one.format.put(one.module, one.name, parameter)


def _released(one: Found) -> Scale | None:
    """The parameter that it was before, if it is still the same memory."""
    before: Scale | None = vars(one.module).get(_RELEASED, {}).pop(one.name, None)
    return before if before is not None and before.data_ptr() == one.tensor.data_ptr() and before.dtype == one.tensor.dtype else None


def _unknown(model: nn.Module) -> str | None:
    """The type of weights that are quantized in a way without scales that are known here."""
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None and is_traceable_wrapper_subclass(weight) and format_of(module) is None:
                return type(weight).__name__
    return None


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
