"""W + A B' as operations see it: thin factors are applied to activations, and no matrix is written.

With W of shape (m, n), A (m, r) and B (n, r), x (W + A B')' = x W' + (x B) A': evaluations whose A and B differ share the product with W.
Below are the operations that know this; every other one gets the sum, which is made for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[..., Any]
_OPERATIONS: dict[Any, Operation] = {}
_PROPERTIES = {name: getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")}
_TELLING = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset, Tensor.__len__),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.__hash__),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""What says something about a tensor, and nothing about its values."""


class Factored(Tensor):
    """The sum of `base`, of shape (m, ...), whose matrix is (m, n), and `left` `right`' of shapes (m, r) and (n, r).

    `base` is shared; `left` and `right` may be those of a batch (torch.vmap). `used` is called when values are asked for.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    used: Callable[[], None]

    @staticmethod
    def of(base: Tensor, left: Tensor, right: Tensor, used: Callable[[], None]) -> Factored:
        """The sum, of which nothing is computed."""
        made: Factored = base.detach().as_subclass(Factored)
        made.base, made.left, made.right, made.used = base.detach(), left, right, used
        return made

    def whole(self) -> Tensor:
        """The sum as a tensor."""
        self.used()
        return self.base + (self.left @ self.right.mT).reshape(self.base.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(func)
        found = NotImplemented if operation is None else operation(*args, **kwargs)
        if found is not NotImplemented:
            return found
        tells = func in _TELLING or (getattr(func, "__name__", "") == "__get__" and func not in _PROPERTIES.values())
        change = (lambda one: one.base) if tells else Factored.whole
        return func(*_each(change, args), **_each(change, kwargs))


def _each(change: Callable[[Factored], Tensor], value: Any) -> Any:
    """`value` with every Factored in it changed."""
    if isinstance(value, Factored):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_each(change, one) for one in value)
    return {key: _each(change, one) for key, one in value.items()} if type(value) is dict else value


def _operation(*functions: Any) -> Callable[[Operation], Operation]:
    """Makes the decorated function that of `functions`; it returns NotImplemented where it has no better way than the sum."""

    def register(implementation: Operation) -> Operation:
        _OPERATIONS.update(dict.fromkeys(functions, implementation))
        return implementation

    return register


# ---- other views of the same sum


@_operation(_PROPERTIES["data"], Tensor.detach, torch.detach, Tensor.contiguous, Tensor.requires_grad_)
def _same(w: Factored, *_: Any, **__: Any) -> Factored:
    return w


@_operation(Tensor.t, torch.t, *(_PROPERTIES[name] for name in ("T", "mT", "H", "mH")))
def _transposed(w: Factored) -> Any:
    return Factored.of(w.base.t(), w.right, w.left, w.used) if w.base.dim() == 2 else NotImplemented


@_operation(Tensor.transpose, torch.transpose)
def _transpose(w: Factored, dim0: int, dim1: int) -> Any:
    return w if dim0 % w.base.dim() == dim1 % w.base.dim() else _transposed(w)


@_operation(Tensor.permute, torch.permute)
def _permute(w: Factored, *dims: Any) -> Any:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return _transposed(w) if w.base.dim() == 2 and [int(dim) % 2 for dim in order] == [1, 0] else NotImplemented


def _cast(function: Operation, w: Factored, *how: Any, **named: Any) -> Any:
    base = function(w.base, *how, **named)
    if not isinstance(base, Tensor):  # type() without arguments is a question
        return base
    return w if base is w.base else Factored.of(base, w.left.to(base), w.right.to(base), w.used)


for _function in (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16):
    _operation(_function)(functools.partial(_cast, _function))


# ---- products


@_operation(F.linear)
def _linear(x: Any, w: Any, bias: Any = None) -> Any:
    if not isinstance(w, Factored) or isinstance(x, Factored):
        return NotImplemented
    w.used()
    bias = bias.whole() if isinstance(bias, Factored) else bias
    thin = _Thin.apply(x, w.right.to(x.dtype)) if x.dim() > 1 else F.linear(x, w.right.mT)
    return _plus(F.linear(x, w.base), thin, w.left, bias)


@_operation(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(x: Any, w: Any) -> Any:
    return _linear(x, w.t()) if isinstance(w, Factored) and w.base.dim() == 2 and not isinstance(x, Factored) else NotImplemented


@_operation(Tensor.__rmatmul__)
def _rmatmul(w: Any, x: Any) -> Any:
    return _matmul(x, w)


@_operation(torch.addmm, Tensor.addmm)
def _addmm(bias: Any, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if (beta, alpha) != (1, 1) or not isinstance(w, Factored) or isinstance(x, Factored):
        return NotImplemented
    return _linear(x, w.t(), bias) if bias.dim() == 1 else _linear(x, w.t()) + bias


@_operation(F.embedding)
def _embedding(index: Tensor, w: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    if not isinstance(w, Factored) or max_norm is not None:
        return NotImplemented
    w.used()
    return _plus(F.embedding(index, w.base), F.embedding(index, w.left), w.right, None)


def _convolution(function: Operation, x: Any, w: Any, bias: Any = None, *how: Any, groups: int = 1, **named: Any) -> Any:
    """Filters B' first, and then A as filters of one element."""
    if not isinstance(w, Factored) or isinstance(x, Factored) or groups != 1 or len(how) > 3:
        return NotImplemented
    w.used()
    filters = w.right.mT.reshape(w.right.shape[-1], *w.base.shape[1:])
    mix = w.left.reshape(*w.left.shape, *[1] * (w.base.dim() - 2))
    bias = bias.whole() if isinstance(bias, Factored) else bias
    return function(x, w.base, bias, *how, **named) + function(function(x, filters, None, *how, **named), mix)


for _function in (F.conv1d, F.conv2d, F.conv3d):  # type: ignore[assignment]
    _operation(_function)(functools.partial(_convolution, _function))


# ---- the sum of a product with W and one of factors


def _plus(y: Tensor, x: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """y + x factor' + bias, of shapes (..., m), (..., r), (m, r) and (m); `y`, which nobody else has, may be written to."""
    return _Plus.apply(y, x, factor.to(y.dtype), bias)  # type: ignore[no-any-return]


class _Thin(torch.autograd.Function):
    """x B, of shapes (..., n) and (n, r); for many at once by products of B' with x', some times as fast as those of x with B."""

    @staticmethod
    def forward(x: Tensor, right: Tensor) -> Tensor:
        return F.linear(x, right.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, right: Tensor) -> tuple[Tensor, int]:
        own, factor = ((t if dim is None else t.movedim(dim, 0)) for t, dim in zip((x, right), in_dims, strict=True))
        if in_dims[1] is None:
            return F.linear(own, factor.mT), 0
        if in_dims[0] is None:
            own = own.expand(info.batch_size, *own.shape)
        rows = own.reshape(len(own), -1, own.shape[-1])
        return torch.bmm(factor.mT, rows.mT).mT.reshape(*own.shape[:-1], factor.shape[-1]), 0


class _Plus(torch.autograd.Function):
    """The same for many at once by torch.vmap: in one pass over y, which is by far the largest."""

    @staticmethod
    def forward(y: Tensor, x: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        return _into(y.clone()[None], x[None], factor[None], None if bias is None else bias[None])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(info: Any, in_dims: Iterable[int | None], *tensors: Tensor | None) -> tuple[Tensor, int]:
        dims = list(in_dims)
        own = [t if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
        y, x, factor, bias = (
            t if t is None or dim is not None else t.expand(info.batch_size, *t.shape) for t, dim in zip(own, dims, strict=True)
        )
        return _into(y if dims[0] is not None else y.clone(), x, factor, bias), 0  # type: ignore[arg-type, union-attr]


def _into(y: Tensor, x: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The same with a first dimension for each of a batch, into `y`."""
    if bias is not None:
        x, factor = torch.cat([x, x.new_ones(1).expand(*x.shape[:-1], 1)], -1), torch.cat([factor, bias.to(factor)[..., None]], -1)
    rank, count = x.shape[-1], len(y)
    rows, flat = x.reshape(count, -1, rank), y.reshape(count, math.prod(y.shape[1:-1]), y.shape[-1])
    if rank == 1:
        flat.addcmul_(rows, factor.mT)
    else:
        flat.baddbmm_(rows, factor.mT)
    return flat.view(y.shape)
