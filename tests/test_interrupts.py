"""Ctrl-C at any moment of a step, handlers during a fused step in place, and a restore that fails."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, distance, mean_square, mlp, next_token, regression, snapshot
from test_signals import Handler, at_every_line, during_sweep, press, raising, usr1, with_fault  # noqa: F401  (usr1 is a fixture)
from torch import nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import Mask, Where

EVERY = 7
"""Ctrl-C comes at every so many lines of the engine; with 1 the test takes a minute and passes as well; weights in files take longer."""


LISTS = Mask(Where(lambda name, tensor: torch.arange(tensor.numel()).view(tensor.shape) == 1))


def hooks(model: nn.Module) -> int:
    """How many hooks run in a forward pass."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def interrupted(weights: Any, method: str, line: int, mask: Mask | None = None) -> tuple[nn.Module, int, bool]:
    """(model, lines of the engine that ran, whether Ctrl-C ended it) for a second step that is interrupted at a line of it."""
    model, passed = mlp(), 0
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights, mask=mask)
    optimizer.step(mean_square(model, regression()))

    def action() -> None:
        nonlocal passed
        passed += 1
        if passed == line:
            signal.raise_signal(signal.SIGINT)

    try:
        with at_every_line(action):
            getattr(optimizer, method)(mean_square(model, regression()))
    except KeyboardInterrupt:
        return model, passed, True
    return model, passed, False


@pytest.mark.parametrize("mask", [None, LISTS], ids=["dense", "lists"])
@pytest.mark.parametrize("method", ["step", "estimate"])
@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
def test_ctrl_c_at_any_line_leaves_the_weights_of_before_or_after_the_step(
    weights: Any, method: str, mask: Mask | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_lightning.engine.masks.rules.LIST_BELOW", 0.5)
    begun = mlp()
    ZOOptimizer(begun, lr=0.1, weights=weights, mask=mask).step(mean_square(begun, regression()))
    interrupted(weights, method, -1, mask)  # what is made once in a process
    final, lines, _ = interrupted(weights, method, -1, mask)
    assert lines > 500
    usual = hooks(final)
    assert weights is STREAMED or usual == 0
    for line in range(1, lines, EVERY if weights is not STREAMED else 5 * EVERY):
        model, _, ended = interrupted(weights, method, line, mask)
        state = snapshot(model)
        assert ended, line
        assert min(distance(state, snapshot(begun)), distance(state, snapshot(final))) <= 1e-15, line
        assert hooks(model) == usual, line
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_during_a_fused_step_in_place_finds_the_weights_of_before_or_after_it(usr1: list[Handler]) -> None:  # noqa: F811
    """The last perturbation stays in place until the update, which restores in the same pass."""
    model, faulty = with_fault()
    before, saved = snapshot(model), []
    usr1.append(lambda number, frame: saved.append(snapshot(model)))
    faulty.action, faulty.at = lambda: press(signal.SIGUSR1), 2
    ZOOptimizer(model, lr=0.1, weights="inplace").step(next_token(model))
    assert min(distance(before, saved[0]), distance(snapshot(model), saved[0])) <= 1e-15


def test_a_restore_in_place_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.01, weights="inplace")
    during_sweep(monkeypatch, "inplace", 3, raising(MemoryError()))
    with pytest.raises(MemoryError):
        optimizer.estimate(mean_square(model, regression()))
    assert distance(before, snapshot(model)) <= 1e-15


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_backward_that_adds_to_existing_gradients_is_noticed(weights: str) -> None:
    model, data = mlp(), regression()
    mean_square(model, data)().backward()

    def closure() -> torch.Tensor:
        with torch.enable_grad():
            loss = mean_square(model, data)()
            loss.backward()
        return loss.detach()

    with pytest.raises(RuntimeError, match=r"The closure calls backward\(\)"):
        ZOOptimizer(model, lr=0.1, weights=weights).step(closure)
