"""The first call of each of MKL's vector functions, made before any that matters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp),
    *(torch.log, torch.log10, torch.log2, torch.sin, torch.sqrt, torch.tan, torch.tanh),
)


def make() -> None:
    """Call the functions that torch takes from MKL, on one element each.

    MKL chooses a function's version at its first call. Where that one runs on several threads, some of them may take the least accurate
    version for their part (github.com/pytorch/pytorch/issues/188792): logarithms off by 4e-5, once in a process, and a run that is not
    the same when it is made again. One element is one thread.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(one)
