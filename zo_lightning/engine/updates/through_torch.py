"""Adam, and any optimizer of torch.optim, fed with the estimate as its gradient."""

from __future__ import annotations

import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import check_number
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.updates.dense import Dense, DenseState

ELEMENTWISE = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
"""Those that move each element by itself, so that a part of a tensor can be moved as the whole is."""
_OURS = {
    "lr": "Give the learning rate to the optimizer, the strategy or the host.",
    "weight_decay": "Give it to the optimizer, the strategy or the host: decay is decoupled (AdamW's) with every rule.",
    "maximize": "An objective tells whether more is better.",
}


class _OfTorch(Dense):
    """A rule whose steps an optimizer of torch.optim makes."""

    remembers = True

    @abstractmethod
    def made(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer of one tensor."""

    def state_bytes(self, shape: Sequence[int]) -> int:
        small = [size if size < 64 else 64 + place for place, size in enumerate(shape)]  # a smaller tensor, whose dimensions differ
        whole = dict(zip(small, shape, strict=True))
        parameter = nn.Parameter(torch.zeros(small))
        parameter.grad = torch.ones(small)
        with torch.inference_mode(False):
            optimizer = self.made(parameter)
            optimizer.step()
        tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        return sum(math.prod(whole.get(size, size) for size in tensor.shape) * tensor.element_size() for tensor in tensors)

    def begin(self) -> DenseState:
        return _State(self)


@dataclass(frozen=True)
class Adam(_OfTorch):
    """torch.optim.Adam on the estimate g (Kingma and Ba, arXiv 1412.6980); with weight_decay it is AdamW (arXiv 1711.05101).

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, theta <- (1 - lr wd) theta - lr m' / (sqrt(v') + epsilon), with m' and v'
    corrected for their beginning. Two float32 values a trained weight: for adapters, prefixes, masks' lists and small models; ZO-Adam in
    ZO-Bench (arXiv 2402.11592). v sees the noise of the estimate, about |grad|^2 in every coordinate, rather than curvature.

    Raises ValueError for betas outside of [0, 1) and epsilon that is not > 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    name = "adam"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), ">= 0 and < 1", lambda x: 0 <= x < 1)
        check_number("epsilon", self.epsilon, "> 0", lambda x: x > 0)

    def made(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter], betas=(self.beta1, self.beta2), eps=self.epsilon)


@dataclass(frozen=True, init=False)
class TorchOptimizer(_OfTorch):
    """Any optimizer of torch.optim that needs no closure and no sparse gradient, on the estimate: TorchOptimizer("RMSprop", alpha=0.9).

    Its state has what that optimizer keeps, for one tensor after another: for small trainable sets.

    Args:
        optimizer: the class, or its name in torch.optim. clip: as in every rule.
        keywords: its options but lr, weight_decay (decoupled here) and maximize. Numbers, texts, bools and sequences of them.

    Raises ValueError for names that torch.optim does not have, and for options that it refuses.
    """

    optimizer: str = ""
    options: str = "{}"
    """The keywords as JSON, which step logs record."""

    name = "torch"

    def __init__(
        self, optimizer: str | type[torch.optim.Optimizer], *, clip: float | None = None, options: str = "{}", **keywords: Any
    ) -> None:
        name = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer))
        kind = getattr(torch.optim, name, None)
        known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        if not known or (kind is not optimizer and not isinstance(optimizer, str)):
            names = sorted(each for each, found in vars(torch.optim).items() if isinstance(found, type) and each != "Optimizer")
            raise ValueError(f"Invalid optimizer: {optimizer!r}. Use one of torch.optim: {', '.join(names)}.")
        given = {**_read(options), **keywords}
        for key in given:
            if key in _OURS:
                raise ValueError(f"TorchOptimizer({name!r}, {key}={given[key]!r}): {key} is not one of its options here. {_OURS[key]}")
        object.__setattr__(self, "clip", clip)
        object.__setattr__(self, "optimizer", name)
        try:
            object.__setattr__(self, "options", json.dumps(given, sort_keys=True, allow_nan=False))
            self._try()
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise ValueError(f"torch.optim.{name} can't be used with {given}: {error}") from error
        self.__post_init__()

    def _try(self) -> None:
        """What needs a closure, or sparse gradients, or does not know an option, says so now."""
        parameter = nn.Parameter(torch.zeros(2, 2))
        parameter.grad = torch.ones(2, 2)
        with torch.inference_mode(False):
            self.made(parameter).step()

    def check(self, trained: Sequence[Trained]) -> None:
        for p in trained:
            try:
                self.made(nn.Parameter(torch.empty(p.shape, device="meta")))
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"Invalid update: {self!r} can't train {p.name!r} of shape {tuple(p.shape)}: {error}. Freeze it "
                    "(requires_grad=False), or name another optimizer."
                ) from error

    @property
    def kind(self) -> str:
        return f"{self.name}.{self.optimizer}"

    @property
    def shards(self) -> bool:  # type: ignore[override]
        return self.optimizer in ELEMENTWISE

    def made(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        kind = getattr(torch.optim, self.optimizer)
        decay = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(kind).parameters else {}  # AdamW has one of its own
        found: torch.optim.Optimizer = kind([parameter], **decay, **json.loads(self.options))
        return found


def _read(options: str) -> dict[str, Any]:
    try:
        found = json.loads(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Invalid options: {options!r} is no JSON. Give options as keywords, such as alpha=0.9.") from error
    if not isinstance(found, dict):
        raise ValueError(f"Invalid options: {options!r} is no JSON of names and values. Give options as keywords, such as alpha=0.9.")
    return found


class _State(DenseState):
    """An optimizer for each tensor."""

    rule: _OfTorch

    def __init__(self, rule: _OfTorch) -> None:
        super().__init__(rule)
        self._made: dict[int, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
        self._saved: dict[int, Any] = {}
        """States of tensors that were not moved since they were loaded."""

    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        parameter, optimizer = self._of(key, theta)
        parameter.data, parameter.grad = theta, estimate
        try:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        finally:
            parameter.data, parameter.grad = theta.new_empty(0), None  # theta and the estimate are not kept

    def _of(self, key: int, theta: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        before = self._made.get(key)
        if before is not None and (before[0].device, before[0].dtype) == (theta.device, theta.dtype):
            return before
        state = self._saved.pop(key, None) if before is None else before[1].state_dict()["state"]
        parameter = nn.Parameter(theta)
        optimizer = self.rule.made(parameter)
        if state:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self._made[key] = parameter, optimizer
        return self._made[key]

    def clear(self) -> None:
        self._made, self._saved = {}, {}

    def state_dict(self) -> dict[str, Any]:
        states = {key: optimizer.state_dict()["state"] for key, (_, optimizer) in self._made.items()}
        return {str(key): _copied(state) for key, state in {**self._saved, **states}.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._made, self._saved = {}, {int(key): _copied(own) for key, own in state.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(own) for key, own in value.items()}
    return value.clone() if isinstance(value, Tensor) else value
