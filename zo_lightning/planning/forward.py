"""What a forward pass needs: its operations and its live memory over time, found out on tensors without data."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

HEAP = 32 << 20
"""Bytes. What a CPU tensor of at most this size had may stay in the process when it is freed: glibc's malloc takes it from a heap that
shrinks at its end alone (M_MMAP_THRESHOLD, which grows up to here by itself). Larger tensors have pages of their own."""

Forward = Callable[[nn.Module, Any], Any]
"""`forward(model, inputs)` makes one forward pass and returns the loss."""


@dataclass
class Stretch:
    """A part of a forward pass in which the same of the watched modules ran, outermost first; bytes of live activations.

    `began` is what was alive when the stretch began, `peak` the most that was during it. `entered` is the module whose beginning began it,
    None where it was the end of one.
    """

    running: tuple[nn.Module, ...]
    entered: nn.Module | None
    began: int
    peak: int


@dataclass(frozen=True)
class Pass:
    """One forward pass: floating-point operations of its matrix products, convolutions and attention, and its stretches in order."""

    flops: int
    stretches: tuple[Stretch, ...]
    kept: int
    """Bytes above `peak` of a CPU process that never gives back the memory of tensors up to `HEAP`, and always that of larger ones."""

    @property
    def peak(self) -> int:
        """The most bytes of activations that are alive at one moment, inputs included."""
        return max(stretch.peak for stretch in self.stretches)


def trace(model: nn.Module, inputs: Any, forward: Forward, watched: Iterable[nn.Module] = (), device: str = "cpu") -> Pass:
    """A forward pass without gradients of `model`, which may be on the meta device, on `inputs`, tensors on the meta device in any nesting.

    Every operation runs on tensors that have shapes but no data (FakeTensor of a CPU), so that no memory is needed and kernels are chosen
    as on a CPU: attention is the fused kernel where that accepts its inputs and, with dropout for example, the composite one. For `device`
    "cuda" attention is a fused kernel always. Not seen: what a kernel allocates for itself.

    Raises ValueError where the forward pass depends on values of tensors, which do not exist here.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    empty: dict[int, FakeTensor] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in empty:
            bare = torch.empty_like(tensor, device="meta", requires_grad=False)
            empty[id(tensor)] = FakeTensor(mode, bare, torch.device("cpu"))
        return empty[id(tensor)]

    weights = {name: fake(tensor) for name, tensor in _tensors_of(model)}
    given = tree_map(fake, inputs)
    here = [tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]
    meter = _Meter(weights.values(), here)
    attention: contextlib.AbstractContextManager[Any] = _FusedAttention(meter) if device == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), meter.watching(watched), mode, attention, meter:
            loss = _call(model, weights, forward, given)
            del loss
    except (torch._subclasses.fake_tensor.DataDependentOutputException, torch._subclasses.fake_tensor.DynamicOutputShapeException) as error:
        raise ValueError(
            f"The forward pass of {type(model).__name__} depends on values of tensors ({error}), and a plan knows only their shapes. "
            "Pass a forward function that does not."
        ) from error
    peak = max(stretch.peak for stretch in meter.stretches)
    return Pass(meter.flops, tuple(meter.stretches), max(0, sum(meter.most) - peak))


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Whole(nn.Module):
    """A forward function as a module, so that torch can put other tensors into the model's places."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.call = model, forward

    def forward(self, given: Any) -> Any:
        return self.call(self.model, given)


def _call(model: nn.Module, weights: dict[str, Any], forward: Forward, given: Any) -> Any:
    places = {f"model.{name}": tensor for name, tensor in weights.items()}
    return torch.func.functional_call(_Whole(model, forward), places, (given,), tie_weights=False)


class _Meter(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live, and the operations."""

    def __init__(self, weights: Iterable[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.live = sum(tensor.nbytes for tensor in inputs)
        self._known: dict[int, Any] = {}
        for tensor in [*weights, *inputs]:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage
        self._running: list[nn.Module] = []
        self._now = [self.live, 0]
        self.most = [self.live, 0]
        """The most bytes in tensors up to `HEAP` and in larger ones, each at its own moment."""
        self.stretches = [Stretch((), None, self.live, self.live)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, nbytes = storage._cdata, storage.nbytes()
        large = int(nbytes > HEAP)
        if place in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(place, None)
            self.live -= nbytes
            self._now[large] -= nbytes

        self._known[place] = weakref.ref(storage, gone)
        self.live += nbytes
        self._now[large] += nbytes
        self.most[large] = max(self.most[large], self._now[large])
        self.stretches[-1].peak = max(self.stretches[-1].peak, self.live)

    @contextlib.contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Inside it, stretches begin and end with the calls of these modules."""
        with contextlib.ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(self._enter).remove)
                hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        self._begin(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._begin(None)

    def _begin(self, entered: nn.Module | None) -> None:
        self.stretches.append(Stretch(tuple(self._running), entered, self.live, self.live))


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels of a GPU do it: nothing is alive but the output and a number for each row."""

    def __init__(self, meter: _Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        query, key, value = (args[i] if i < len(args) else (kwargs or {})[name] for i, name in enumerate(names))
        shape, rows = (*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)
        flat = [(math.prod(tensor.shape[:-3]), *tensor.shape[-3:]) for tensor in (query, key, value)]
        heads = flat[0][1]
        self._meter.flops += sdpa_flop_count(*((size[0], heads, *size[2:]) for size in flat))
        out = query.new_empty(shape)
        del rows
        return out
