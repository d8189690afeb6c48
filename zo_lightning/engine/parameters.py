"""Which tensors are trained: stable names and keys, groups, tied, frozen and unusual weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.noise.region import Region
from zo_lightning.engine.seeds import parameter_key
from zo_lightning.engine.shards import local, region_of

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True, eq=False)
class Trained:
    """One trained tensor: its canonical name and key, the group whose lr, eps and decay it has, and every parameter tied to it.

    `unit` and `least` are those of a `Scale`. Of a sharded parameter, `tensor` is the local part, and `region` tells which.
    """

    name: str
    key: int
    tensor: Tensor
    group: int
    aliases: tuple[Tensor, ...]
    unit: float = 1.0
    least: float | None = None
    region: Region | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.tensor.shape) if self.region is None else self.region.shape

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return self.tensor.numel() if self.region is None else self.region.numel


class Scale(nn.Parameter):
    """A parameter whose noise has a size of its own, unit * z, and which no update takes below `least` (None: no bound).

    Evaluations are at theta + eps unit z, updates are theta <- max(least, (1 - lr wd) theta - lr g unit z): theta / unit is perturbed and
    updated as other parameters are.
    """

    unit: float
    least: float | None

    def __new__(cls, data: Tensor, requires_grad: bool = True, unit: float = 1.0, least: float | None = None) -> Scale:
        made: Scale = super().__new__(cls, data, requires_grad)
        made.unit, made.least = unit, least
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Scale:
        if id(self) not in memo:
            memo[id(self)] = Scale(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad, self.unit, self.least)
        copied: Scale = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Scale, (self.detach(), self.requires_grad, self.unit, self.least)


def canonical_names(names: Sequence[str]) -> list[str]:
    """Names without wrapper prefixes and without their longest common module prefix.

    The same model then has the same names bare, compiled, under DDP or FSDP, in a LightningModule and in a Trainer.
    """
    parts = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    bare = [[part for part in name if part != "module"] or name for name in parts]
    if len({tuple(name) for name in bare}) == len(bare):
        parts = bare
    while parts and all(len(name) > 1 for name in parts) and len({name[0] for name in parts}) == 1:
        parts = [name[1:] for name in parts]
    return [".".join(name) for name in parts]


def names_of(module: nn.Module) -> dict[int, str]:
    """id(parameter) -> canonical name, for every parameter of `module`, trained or not; a tied parameter has its first name."""
    named = list(module.named_parameters())
    canonical = canonical_names([name for name, _ in named])
    return {id(parameter): name for (_, parameter), name in zip(named, canonical, strict=True)}


def every_name_of(module: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> its canonical names, of which a tied parameter has several."""
    named = list(module.named_parameters(remove_duplicate=False))
    found: dict[int, list[str]] = {}
    for (_, parameter), name in zip(named, canonical_names([name for name, _ in named]), strict=True):
        found.setdefault(id(parameter), []).append(name)
    return found


def split_input(params: Any) -> tuple[nn.Module | None, list[dict[str, Any]], dict[int, str]]:
    """(module, torch parameter groups, names given by the user) from whatever `ZOOptimizer` was handed."""
    if isinstance(params, nn.Module):
        return params, [{"params": list(params.parameters())}], {}
    if isinstance(params, Tensor):
        raise TypeError("params must be a module or an iterable of tensors, named tensors or groups; it is a single tensor. Use [tensor].")
    entries = list(params)
    if not entries:
        raise ValueError("params is empty: there is nothing to train. Pass a module, its parameters, or parameter groups.")
    groups = entries if all(isinstance(entry, Mapping) for entry in entries) else [{"params": entries}]
    names: dict[int, str] = {}
    plain = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        tensors = []
        for member in members:
            if isinstance(member, tuple):
                name, member = member
                names[id(member)] = str(name)
            tensors.append(member)
        plain.append({**group, "params": tensors})
    return None, plain, names


def collect(groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> list[Trained]:
    """The trained tensors of torch parameter groups, in order. Frozen and integer tensors are left out.

    Raises ValueError where a tensor that should be trained can't be: on the meta device, complex, sparse, quantized or otherwise wrapped,
    partly sharing memory with another one, or under a name that is taken.
    """
    tied: dict[tuple[Any, ...], list[Tensor]] = {}
    order: list[tuple[tuple[Any, ...], str, int]] = []
    position = 0
    for index, group in enumerate(groups):
        for tensor in group["params"]:
            name = names.get(id(tensor), f"unnamed.{position}")
            position += 1
            if not tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            mine = local(tensor)
            _check(name, mine)
            place = (mine.data_ptr() if mine.numel() else id(tensor), tensor.shape, mine.stride(), mine.dtype)
            if place not in tied:
                tied[place] = []
                order.append((place, name, index))
            tied[place].append(tensor)
    trained = []
    for place, name, index in order:
        first, aliases = tied[place][0], tuple(tied[place])
        trained.append(Trained(name, parameter_key(name), local(first), index, aliases, *_scale(aliases), region_of(name, first)))
    _check_names(trained)
    _check_overlap(trained)
    return trained


def _scale(aliases: Sequence[Tensor]) -> tuple[float, float | None]:
    return next(((alias.unit, alias.least) for alias in aliases if isinstance(alias, Scale)), (1.0, None))


def _check(name: str, tensor: Tensor) -> None:
    problem = None
    if tensor.is_meta:
        problem = "is on the meta device, so it has no values (offloaded by accelerate, or never loaded); load the weights first"
    elif is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__name__
        problem = f"is a {kind}, which can't be perturbed as it is; train its scales (zo_lightning.quantized), or adapters on top of it"
    elif tensor.is_inference():
        problem = "was made under torch.inference_mode(), where torch allows no change of it; make or load the model outside, or clone it"
    elif tensor.is_complex():
        problem = f"has the complex dtype {tensor.dtype}; train its real view (torch.view_as_real)"
    elif tensor.layout != torch.strided:
        problem = f"has layout {tensor.layout}; only dense tensors can be perturbed"
    elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        problem = "is expanded, so several of its elements share memory; train a copy of it (.contiguous())"
    elif tensor.dtype.itemsize < 2:
        problem = f"has dtype {tensor.dtype}; float16, bfloat16, float32 and float64 weights can be trained"
    if problem:
        raise ValueError(f"Parameter {name!r} {problem}, or set requires_grad=False to leave it alone.")


def _check_names(trained: Sequence[Trained]) -> None:
    seen: dict[int, Trained] = {}
    for parameter in trained:
        other = seen.setdefault(parameter.key, parameter)
        if other is not parameter:
            raise ValueError(
                f"Two different parameters are called {parameter.name!r}: they would share their noise. Give them other names."
            )


def _check_overlap(trained: Sequence[Trained]) -> None:
    spans = []
    for parameter in trained:
        tensor = parameter.tensor
        if tensor.numel() and tensor.is_contiguous():
            spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, parameter.name))
    spans.sort()
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise ValueError(
                f"Parameters {name!r} and {other!r} share a part of their memory: it would be perturbed twice. Train one view."
            )


def signature(groups: Sequence[Mapping[str, Any]], kept: Callable[[Tensor], bool] | None = None) -> tuple[Any, ...]:
    """Changes when `collect` could give another answer: tensors added, frozen, moved, cast or replaced.

    With `kept`, also when frozen ones move; those that are `kept` may.
    """
    tensors: list[Tensor] = [p for group in groups for p in group["params"]]
    trained = [p for p in tensors if p.requires_grad]
    placed = trained if kept is None else tensors
    places = [0 if _unplaced(mine := local(p)) or (kept is not None and kept(p)) else mine.data_ptr() for p in placed]
    return list(map(id, tensors)), list(map(id, trained)), places, [(p.dtype, p.device, p.shape) for p in trained]


def _unplaced(tensor: Tensor) -> bool:
    return tensor.is_meta or (type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors among `tensors`."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())
