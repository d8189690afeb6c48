"""Plain loops with a step log for the tests of Trajectory: run, cut off, begun again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.trajectory import Trajectory


class CutError(Exception):
    """What a kill is in these tests."""


@dataclass(frozen=True)
class Setup:
    """One kind of run."""

    weights: str = "exact"
    dtype: torch.dtype = torch.float32
    estimator: Any = None
    micro: int = 1
    steps: int = 9
    idle: tuple[int, ...] = ()
    """Windows whose losses are all None."""
    partly: tuple[int, ...] = ()
    """Windows whose first loss is None."""
    infinite: tuple[int, ...] = ()
    """Windows whose loss is infinite."""
    norm: bool = False
    schedule: bool = False
    groups: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Setup:
        """Another one."""
        return replace(self, **changes)


@dataclass
class Loop:
    """A loop as a user would write it."""

    setup: Setup
    folder: Path
    seed: int = 1
    calls: int = 0
    between: dict[int, Callable[[Loop], None]] = field(default_factory=dict)
    """What the user does before a window."""
    inside: dict[int, Callable[[Loop], None]] = field(default_factory=dict)
    """What the user does behind each micro-batch of a window."""
    log: Any = None

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        norm = [nn.BatchNorm1d(8)] if self.setup.norm else []
        self.net = nn.Sequential(nn.Linear(4, 8), *norm, nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2)).to(self.setup.dtype)
        groups: Any = self.net
        if self.setup.groups:
            named = list(self.net.named_parameters())
            groups = [{"params": named[:1], "lr": 3e-2, "weight_decay": 0.1}, {"params": named[1:], "eps": 2e-2}]
        given = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 1e-2, "seed": 5, "module": self.net, **self.setup.options}
        self.optimizer = ZOOptimizer(groups, estimator=self.setup.estimator, weights=self.setup.weights, **given)
        kind = torch.optim.lr_scheduler.ExponentialLR
        self.schedule = kind(self.optimizer, 0.9) if self.setup.schedule else None

    def loss(self, window: int, part: int) -> Any:
        """Of one micro-batch, or None."""
        self.calls += 1
        draw = torch.Generator().manual_seed(100 * window + part)
        x = torch.randn(6, 4, generator=draw).to(self.setup.dtype)
        loss = nn.functional.cross_entropy(self.net(x).float(), torch.arange(6) % 2)
        if window in self.setup.idle or (window in self.setup.partly and part == 0):
            return None
        return loss * math.inf if window in self.setup.infinite else loss

    def windows(self, begin: int = 0, stop: int | None = None, cut: tuple[int, int] | None = None) -> None:
        """The loop; at `cut`, a window and a count of forward passes in it, it is over."""
        for window in range(begin, self.setup.steps if stop is None else stop):
            if window in self.between:
                self.between[window](self)
            self._window(window, cut)
            if self.schedule is not None:
                self.schedule.step()

    def _window(self, window: int, cut: tuple[int, int] | None) -> None:
        calls = self.calls
        for part in range(self.setup.micro):

            def closure(part: int = part) -> Any:
                if cut is not None and window == cut[0] and self.calls - calls == cut[1]:
                    raise CutError
                return self.loss(window, part)

            self.optimizer.estimate(closure, weight=1 / self.setup.micro)
            if window in self.inside:
                self.inside[window](self)
        self.optimizer.step()

    def begin(self, resume: bool | str = "auto", **options: Any) -> Loop:
        """Begin or continue the log."""
        self.log = Trajectory(self.folder, **options)
        self.log.begin(self.optimizer, resume)
        return self

    def close(self) -> Loop:
        """What becomes of the file when the process dies."""
        self.log.close(self.optimizer)
        return self

    def end(self) -> Loop:
        """The loop ended by itself."""
        self.log.end(self.optimizer)
        return self.close()

    def run(self, cut: tuple[int, int] | None = None, **options: Any) -> Loop:
        """All of it, up to the cut."""
        self.begin(**options)
        try:
            self.windows(cut=cut)
        except CutError:
            return self.close()
        return self.end()

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run must have, too."""
        own = self.optimizer.state_dict()
        tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        return {"tensors": tensors, "zo": own["zo"], "groups": own["param_groups"]}


def equal(left: Any, right: Any) -> bool:
    """Bit for bit, all the way down."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
