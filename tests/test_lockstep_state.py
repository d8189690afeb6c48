"""State that evaluations in lockstep would share: each has a version of its own, or they run one after another, which is said."""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from engine_models import same, snapshot
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.messages import ZOWarning, reset
from zo_lightning.engine.residency import Offload

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Slotted:
    __slots__ = ("value",)


class Layers(nn.Module):
    """`change(module, rows)` is what happens between two of them."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor], **state: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.change = change
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = self.change(self, layer(rows))
        return rows


class OfClass(Layers):
    table: ClassVar[dict[int, Tensor]] = {}


def add_up(holder: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A sum over the layers in an attribute of some object, begun anew after four."""

    def change(module: Any, rows: Tensor) -> Tensor:
        one = holder(module)
        one.value = rows.mean() + (one.value if module.calls % 4 else 0.0)
        module.calls += 1
        return rows + 0.1 * one.value

    return change


def into_table(module: Any, rows: Tensor) -> Tensor:
    number = module.calls % 4
    module.calls += 1
    if number == 0:
        module.table.clear()
    module.table[number] = rows.mean()
    return rows + sum(module.table.values())


def workspace(module: Any, rows: Tensor) -> Tensor:
    number = module.calls % 4
    module.calls += 1
    if number == 0:
        module.space.fill(0) if isinstance(module.space, numpy.ndarray) else module.space.zero_()
    module.space[number] += float(rows.mean())
    return rows + float(module.space.sum())


def slotted() -> Slotted:
    made = Slotted()
    made.value = 0.0  # type: ignore[attr-defined]
    return made


def draws(draw: Callable[[Any], float]) -> Callable[[Any, Tensor], Tensor]:
    return lambda module, rows: rows * draw(module.source)


STATES: dict[str, Callable[[], nn.Module]] = {
    "torch's generator": lambda: Layers(draws(lambda s: float(torch.rand(1, generator=s))), source=torch.Generator().manual_seed(5)),
    "numpy's generator": lambda: Layers(draws(lambda s: s.random()), source=numpy.random.default_rng(5)),
    "numpy's old one": lambda: Layers(draws(lambda s: s.random_sample()), source=numpy.random.RandomState(5)),
    "Python's generator": lambda: Layers(draws(lambda s: s.random()), source=random.Random(5)),
    "an iterator": lambda: Layers(draws(lambda s: 1 + next(s) % 7), source=itertools.count()),
    "an object in an object": lambda: Layers(add_up(lambda m: m.one.two), one=SimpleNamespace(two=SimpleNamespace(value=0.0)), calls=0),
    "an object in a list": lambda: Layers(add_up(lambda m: m.one[0]), one=[SimpleNamespace(value=0.0)], calls=0),
    "slots": lambda: Layers(add_up(lambda m: m.one), one=slotted(), calls=0),
    "a dict of the class": lambda: OfClass(into_table, calls=0),
    "an array": lambda: Layers(workspace, space=numpy.zeros(4), calls=0),
    "a large tensor": lambda: Layers(workspace, space=torch.zeros(4, 5000), calls=0),
}


def trained(make: Callable[[], nn.Module], weights: Any, around: Callable[[], Any] | None = None) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = make()
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2, weights=weights, safeguard=None)

    def closure() -> Tensor:
        if around is None:
            return model(X).square().mean()
        with around():
            return model(X).square().mean()

    return [float(optimizer.step(closure)) for _ in range(6)], snapshot(model)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*run one after another:zo_lightning.engine.messages.ZOWarning")
@pytest.mark.parametrize("kind", STATES)
def test_what_modules_hold(kind: str) -> None:
    OfClass.table.clear()
    losses, weights = trained(STATES[kind], "exact")
    OfClass.table.clear()
    found, streamed = trained(STATES[kind], Offload())
    assert found == losses
    assert same(streamed, weights)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("an iterator", r"draw from one iterator \(Layers.source\)"), ("a large tensor", r"write to a large tensor \(Layers.space\)")],
)
def test_what_can_have_no_versions_is_said(kind: str, why: str) -> None:
    reset()
    with pytest.warns(ZOWarning, match=f"run one after another.*{why}"):
        trained(STATES[kind], Offload())
    with pytest.raises(ValueError, match=f"lockstep=True.*{why}"):
        trained(STATES[kind], Offload(lockstep=True))


@pytest.mark.parametrize("asked", [None, True])
def test_a_large_tensor_that_is_written_to_from_some_step_on(asked: bool | None) -> None:
    """The step that begins to is in lockstep; those after it are not."""
    reset()

    def make() -> nn.Module:
        return Layers(lambda module, rows: workspace(module, rows) if module.calls >= 0 else rows, space=torch.zeros(4, 5000), calls=-1)

    torch.manual_seed(0)
    model: Any = make()
    optimizer = ZOOptimizer(model, lr=1e-2, weights=Offload(lockstep=asked))
    for _ in range(4):
        optimizer.step(lambda: model(X).square().mean())
    assert optimizer.lockstep
    model.calls = 0
    optimizer.step(lambda: model(X).square().mean())
    said = pytest.warns(ZOWarning, match="write to a large tensor") if asked is None else pytest.raises(ValueError, match="large tensor")
    with said:
        optimizer.step(lambda: model(X).square().mean())


@contextmanager
def default_dtype() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
        assert torch.full((1,), 1.0).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


@contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


AROUND: dict[str, Callable[[], Any]] = {
    "the default dtype": default_dtype,
    "a kernel of attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "warnings": quiet,
    "standard output": lambda: redirect_stdout(StringIO()),
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
}


def process() -> tuple[Any, ...]:
    kernels = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.backends.mkldnn.enabled)
    return torch.get_default_dtype(), kernels, list(warnings.filters), sys.stdout


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("kind", AROUND)
def test_settings_of_the_process_around_a_forward_pass(kind: str) -> None:
    def make() -> nn.Module:
        return Layers(lambda module, rows: rows)

    before = process()
    losses, weights = trained(make, "exact", AROUND[kind])
    found, streamed = trained(make, Offload(lockstep=True), AROUND[kind])
    assert process() == before
    assert found == losses
    assert same(streamed, weights)


def test_cached_parametrizations() -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(weight_norm(nn.Linear(16, 16)), nn.Tanh()) for _ in range(4)))

    losses, weights = trained(make, "exact", parametrize.cached)
    found, streamed = trained(make, Offload(lockstep=True), parametrize.cached)
    assert found == losses
    assert same(streamed, weights)
    assert not parametrize._cache_enabled
    assert not parametrize._cache
