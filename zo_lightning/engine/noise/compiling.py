"""Compiled kernels with an eager way out: what to do where there is no C++ compiler or no Triton."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from zo_lightning.engine.messages import say_once

SWITCH = "ZO_LIGHTNING_COMPILE"
"""Environment variable: "0" keeps every kernel eager."""


@functools.cache
def available(device_type: str) -> bool:
    """Whether torch.compile works on this kind of device here; found out once, by compiling an addition."""
    if os.environ.get(SWITCH, "1") == "0":
        return False
    try:
        with warnings.catch_warnings():  # those of torch's compiler; where warnings are errors, one would count as a failure
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x + 1, dynamic=True)(torch.zeros(3, device=device_type))
    except Exception as error:  # whatever inductor, the C++ compiler or Triton raise: each means "not here"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say_once(
            "compile",
            f"torch.compile does not work here on {device_type} ({type(error).__name__}: {reason}), so the noise kernels run eagerly: same "
            f"values, slower steps. Install a C++ compiler (CPU) or Triton (GPU), or set {SWITCH}=0 to silence this.",
        )
        return False
    return True


def dispatch(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A `kernel`, or the function under it where nothing can be compiled."""
    return function if available(device.type) else function._torchdynamo_orig_callable  # type: ignore[attr-defined]


_LIMIT = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
"""Versions of a kernel: by dtype, by whether there is a mask, by sizes that torch treats specially. Before torch 2.13 it allows eight."""


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for any length, at its first call."""
    return torch.compile(function, dynamic=True, fullgraph=True, **_LIMIT)  # type: ignore[call-overload,no-any-return]
