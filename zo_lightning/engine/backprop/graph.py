"""Evaluations whose loss is differentiated with respect to the last layers, at the points where a step evaluates it anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.messages import say_once, tell_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency import Residency

if TYPE_CHECKING:
    from zo_lightning.engine.backprop.tail import Tail

Differentiate = Callable[[Any, Callable[[Any], Any]], Any]
"""From what a closure returned, and the function that takes the loss from it, to the same without a graph."""


def as_it_is(output: Any, loss_of: Callable[[Any], Any]) -> Any:
    """Nothing is differentiated."""
    return output


class NoGraph:
    """Evaluations without a gradient."""

    parameters: Sequence[Trained] = ()
    sums: Sequence[Tensor] = ()

    def recording(self, point: Displacement | None) -> AbstractContextManager[Differentiate]:
        """Around the closure at a point; what it gives is called with the output of the closure."""
        return nullcontext(as_it_is)


NO_GRAPH = NoGraph()


class Graph(NoGraph):
    """The evaluations of one micro-batch; `sums` are those of dl / dphi over the points that are differentiated, in float32 or wider."""

    def __init__(self, tail: Tail, points: Sequence[Displacement], residency: Residency, module: nn.Module | None) -> None:
        self.parameters = tail.parameters
        self.sums = [torch.zeros_like(p.tensor, dtype=wide(p.tensor.dtype)) for p in tail.parameters]
        self._tail = tail
        self._points = differentiated(points)
        self._residency, self._module = residency, module

    @contextmanager
    def recording(self, point: Displacement | None) -> Iterator[Differentiate]:
        if point is None or point not in self._points:
            yield as_it_is
            return
        constants = self._constants()
        self._tail.recording = True
        try:
            for tensor in constants:
                tensor.requires_grad = False
            with torch.enable_grad(), nullcontext() if self._residency.lasts else self._kept():
                yield self._differentiate
        finally:
            for tensor in constants:
                tensor.requires_grad = True
            self._tail.recording = False

    def _constants(self) -> list[Tensor]:
        own = {id(alias) for p in self.parameters for alias in p.aliases}
        every = [*(() if self._module is None else self._module.parameters()), *(a for p in self._residency.trained for a in p.aliases)]
        return [tensor for tensor in every if tensor.requires_grad and id(tensor) not in own]

    def _differentiate(self, output: Any, loss_of: Callable[[Any], Any]) -> Any:
        loss = None if output is None else loss_of(output)
        if loss is None:
            return output
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            self._add(loss)
        elif not self._tail.reached and not (isinstance(loss, Tensor) and loss.numel() != 1):  # for which there is another message
            raise RuntimeError(_NO_GRADIENT.format(what="was detached" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"))
        return tree_map_only(Tensor, lambda tensor: tensor.detach() if tensor.requires_grad else tensor, output)

    def _add(self, loss: Tensor) -> None:
        aliases = [alias for p in self.parameters for alias in p.aliases]
        first, lost = not self._tail.reached, list[str]()
        found = iter(torch.autograd.grad(loss.reshape(()), aliases, allow_unused=True))
        for p, total in zip(self.parameters, self.sums, strict=True):
            gradients = [gradient for gradient in (next(found) for _ in p.aliases) if gradient is not None]
            for gradient in gradients:
                total.add_(gradient.to(total.device))
                self._tail.reached = True
            if first and not gradients:
                lost.append(p.name)
        if not self._tail.reached:
            raise RuntimeError(_NO_GRADIENT.format(what="does not depend on them"))
        if lost:
            say_once("backprop.lost", _LOST.format(names=", ".join(map(repr, lost[:5]))))
        if first and _others_in(loss, {id(alias) for alias in aliases}):
            say_once("backprop.others", _OTHERS)

    def _kept(self) -> saved_tensors_hooks:
        """Weights that are only there while their module runs are copied where the gradient will need them: those behind phi."""
        aliases = [alias for p in self._residency.trained for alias in p.aliases]

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            kept = tensor.detach()
            if not tensor.requires_grad and _storage(tensor) in {_storage(alias) for alias in aliases}:
                kept = kept.clone()
                tell_once("backprop.behind", _BEHIND)
            return kept, kept._version

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            tensor, version = packed
            if tensor._version != version:  # torch does not look where there are hooks
                raise RuntimeError(_INPLACE.format(shape=tuple(tensor.shape)))
            return tensor

        return saved_tensors_hooks(pack, unpack)


def differentiated(points: Sequence[Displacement]) -> list[Displacement]:
    """The points of a step at which the loss is differentiated: where the weights are, or else all of them."""
    return [point for point in points if not point] or list(points)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What gradients of such parameters are summed in."""
    return torch.promote_types(dtype, torch.float32)


def _others_in(loss: Tensor, own: set[int]) -> bool:
    """Whether the graph has leaves beside those."""
    seen: set[Any] = set()
    stack: list[Any] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in own:
            return True
        stack.extend(following for following, _ in node.next_functions)
    return False


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and not tensor.is_meta else 0


_NO_GRADIENT = (
    "The loss has no gradient with respect to the parameters of backprop=: it {what}. Return it as the model computed it, with its graph "
    "(no .detach(), .item() or no_grad in the closure), or leave backprop out."
)

_LOST = (
    "{names} of backprop= had no gradient in the first evaluation, and are not trained as long as they have none: the loss does not depend "
    "on them there, or they run inside checkpoint(use_reentrant=True), which needs an input that requires a gradient. Use "
    "use_reentrant=False."
)

_BEHIND = (
    "backprop= names layers that are not the last: what is trained forward-only behind them is copied, and activations there are kept, for "
    "their gradient."
)

_OTHERS = (
    "The loss depends on a tensor that requires a gradient and is no parameter of backprop=, so that the activations between it and the "
    "loss are kept for nothing. Of a transformers model with enable_input_require_grads() it is the embedding: call "
    "model.disable_input_require_grads()."
)

_INPLACE = (
    "A tensor of shape {shape} that a gradient of backprop= needs was modified by an inplace operation. Use the operation that makes a new "
    "tensor (inplace=False)."
)
