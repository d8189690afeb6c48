"""Interruptions: exceptions in a forward or a sweep, Ctrl-C and other signals find and leave unperturbed weights."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from engine_models import (
    RESIDENCIES,
    Spy,
    distance,
    mean_square,
    mlp,
    next_token,
    regression,
    same,
    sequence_model,
    snapshot,
    train,
)
from torch import Tensor, nn

from zo_lightning import engine
from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.signals import held

ROUNDING = {"exact": 0.0, "copy": 0.0, "inplace": 1e-15}
"""How far weights of order 1 may be from what they were."""

ENGINE = str(Path(engine.__file__).parent)

TraceFunction = Callable[[FrameType, str, object], object]
Handler = Callable[[int, FrameType | None], None]


# ---- exceptions


class Faulty(nn.Module):
    """Raises at one of its calls, or does something else there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.at = inner, 0, -1
        self.action: Callable[[], None] = lambda: None

    def forward(self, *args: object, **kwargs: object) -> object:
        result = self.inner(*args, **kwargs)
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return result


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def with_fault(place: str = "inside a block") -> tuple[nn.Module, Faulty]:
    """A language model with a fault that is off, deep in a block, around a block, or after them."""
    model = sequence_model("tied head")
    if place == "inside a block":
        model.blocks[1].up = faulty = Faulty(model.blocks[1].up)
    elif place == "around a block":
        model.blocks[1] = faulty = Faulty(model.blocks[1])
    else:
        model.norm = faulty = Faulty(model.norm)
    return model, faulty


@pytest.mark.parametrize("error", [ValueError("bad batch"), torch.OutOfMemoryError("out"), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("place", ["inside a block", "around a block", "after the blocks"])
def test_an_exception_in_any_forward_leaves_the_weights_and_no_hook_behind(place: str, weights: str, error: BaseException) -> None:
    untroubled, _ = with_fault(place)
    expected = train(ZOOptimizer(untroubled, lr=0.01, weights=weights), next_token(untroubled))
    for at in range(1, 4 if weights == "exact" else 3):  # the first pass of the exact mode is watched
        model, faulty = with_fault(place)
        bases, before = [p.data_ptr() for p in model.parameters()], snapshot(model)
        optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
        faulty.action, faulty.at = raising(error), at
        with pytest.raises(type(error)):
            optimizer.step(next_token(model))
        assert [p.data_ptr() for p in model.parameters()] == bases
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert distance(before, snapshot(model)) <= ROUNDING[weights]
        # and the step can be done again, as if nothing had been
        assert train(optimizer, next_token(model)) == [pytest.approx(row, rel=1e-11) for row in expected]


def during_sweep(monkeypatch: pytest.MonkeyPatch, weights: str, number: int, action: Callable[[], None]) -> None:
    """In the middle of sweep `number` (from 1) of a residency: two of three weights are done."""
    module = sys.modules[f"zo_lightning.engine.residency.{'inplace' if weights == 'inplace' else 'scratch'}"]
    real, count = module.sweep, [0]

    def interrupted(items: Sequence[object], seeds: object, noise: object, done: list[object] | None = None, **more: object) -> None:
        done = [] if done is None else done
        count[0] += 1
        real(items[:2], seeds, noise, done, **more)
        if count[0] == number:
            action()
        real(items[2:], seeds, noise, done, **more)

    monkeypatch.setattr(module, "sweep", interrupted)


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("number", [1, 2])
def test_a_sweep_that_fails_half_way_is_undone(number: int, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
    during_sweep(monkeypatch, weights, number, raising(MemoryError()))
    with pytest.raises(MemoryError):
        optimizer.estimate(mean_square(model, regression()))
    assert distance(before, snapshot(model)) <= ROUNDING[weights]


# ---- Ctrl-C


def press(number: int = signal.SIGINT) -> None:
    """What the terminal or a scheduler does. Python runs handlers between two of its instructions."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("point", [1, 2])
def test_ctrl_c_in_the_closure_stops_at_once_and_restores(point: int, weights: str) -> None:
    model = mlp()
    before, spy, passes = snapshot(model), Spy(model), []
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    if weights == "exact":
        optimizer.estimate(mean_square(model, regression()))  # watches a pass first
        optimizer.discard()

    def closure() -> Tensor:
        value = mean_square(model, regression())()
        passes.append("begun")
        if len(passes) == point:
            press()
            passes.append("never")
        return value

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert passes == ["begun"] * point
    assert distance(before, snapshot(model)) <= ROUNDING[weights]
    assert weights == "inplace" or spy.back()
    assert optimizer.steps == 0


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_ctrl_c_inside_a_block_restores(weights: str) -> None:
    model, faulty = with_fault()
    before = snapshot(model)
    faulty.action, faulty.at = press, 2
    with pytest.raises(KeyboardInterrupt):
        ZOOptimizer(model, lr=0.1, weights=weights).step(next_token(model))
    assert distance(before, snapshot(model)) <= ROUNDING[weights]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_during_a_sweep_in_place_waits_for_its_end(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the weights moved would be neither here nor there. The third sweep restores."""
    model, finished = mlp(), []
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weights="inplace")

    def action() -> None:
        press()
        finished.append(number)  # reached: the interrupt did not come between

    during_sweep(monkeypatch, "inplace", number, action)
    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(mean_square(model, regression()))
    assert finished == [number]
    assert distance(before, snapshot(model)) <= ROUNDING["inplace"]


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_ctrl_c_during_the_update_comes_after_the_whole_of_it(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, undisturbed = mlp(), mlp()
    ZOOptimizer(undisturbed, lr=0.1, weights=weights).step(mean_square(undisturbed, regression()))
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    optimizer.residency  # noqa: B018
    place = "inplace" if weights == "inplace" else "base"
    module = sys.modules[f"zo_lightning.engine.residency.{place}"]
    real = module.sweep

    def interrupted(items: Sequence[object], *rest: object, **more: object) -> None:
        real(items[:1], *rest, **more)
        if weights != "inplace" or optimizer.forward_passes == 2:
            press()
        real(items[1:], *rest, **more)

    monkeypatch.setattr(module, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(mean_square(model, regression()))
    assert distance(snapshot(undisturbed), snapshot(model)) <= 1e-15


# ---- handlers of the program


@pytest.fixture
def usr1() -> Iterator[list[Handler]]:
    """A slot for a handler of SIGUSR1, as SLURM's requeueing uses it; what was there before comes back."""
    slot: list[Handler] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: slot[0](number, frame))
    yield slot
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("point", [1, 2])
def test_a_handler_that_saves_a_checkpoint_finds_the_base_weights(point: int, weights: str, usr1: list[Handler]) -> None:
    """SLURM's handlers save from wherever the signal arrives: here in the middle of a forward."""
    model, faulty = with_fault()
    before, saved = snapshot(model), []
    usr1.append(lambda number, frame: saved.append(snapshot(model)))
    faulty.action, faulty.at = lambda: press(signal.SIGUSR1), point
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    optimizer.estimate(next_token(model))
    assert len(saved) == 1
    assert distance(before, saved[0]) <= ROUNDING[weights]
    assert optimizer.apply() is not None  # the run goes on
    assert not same(before, snapshot(model))


@contextmanager
def at_every_line(action: Callable[[], None]) -> Iterator[None]:
    """Do something before every line of the engine that is run."""

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if not frame.f_code.co_filename.startswith(ENGINE):
            return None
        if event == "line":
            action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(("weights", "method"), [("exact", "step"), ("copy", "step"), ("inplace", "estimate")])
def test_a_handler_never_sees_a_perturbed_weight_wherever_the_signal_arrives(weights: str, method: str, usr1: list[Handler]) -> None:
    model, alike = mlp(), mlp()
    getattr(ZOOptimizer(alike, lr=0.1, weights=weights), method)(mean_square(alike, regression()))
    allowed, seen = [snapshot(mlp()), snapshot(alike)], []
    usr1.append(lambda number, frame: seen.append(min(distance(snapshot(model), state) for state in allowed)))
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    with at_every_line(lambda: signal.raise_signal(signal.SIGUSR1)):
        getattr(optimizer, method)(mean_square(model, regression()))
    assert len(seen) > 300
    assert max(seen) <= ROUNDING[weights]
    assert same(snapshot(model), allowed[1])


def test_an_error_in_a_handler_arrives_after_the_weights_are_back(usr1: list[Handler]) -> None:
    model, faulty = with_fault()
    before = snapshot(model)

    def handler(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("preempted")

    usr1.append(handler)
    faulty.action, faulty.at = lambda: press(signal.SIGUSR1), 1
    with pytest.raises(TimeoutError, match="preempted"):
        ZOOptimizer(model, lr=0.1, weights="exact").estimate(next_token(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_handlers_are_the_programs_own_again_after_a_step(weights: str, usr1: list[Handler]) -> None:
    model, watched = mlp(), [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM]
    before = [signal.getsignal(number) for number in watched]
    optimizer = ZOOptimizer(model, weights=weights)
    optimizer.step(mean_square(model, regression()))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert [signal.getsignal(number) for number in watched] == before


def test_held_signals_arrive_in_order_after_the_block(usr1: list[Handler]) -> None:
    arrived: list[str] = []
    usr1.append(lambda number, frame: arrived.append("handler"))
    with held():
        press(signal.SIGUSR1)
        press(signal.SIGUSR1)
        arrived.append("inside")
    assert arrived == ["inside", "handler", "handler"]


def test_steps_outside_the_main_thread_work() -> None:
    """Only the main thread may set handlers, and only it runs them."""
    model, alike = mlp(), mlp()
    worker = threading.Thread(target=lambda: train(ZOOptimizer(model, lr=0.1), mean_square(model, regression())))
    worker.start()
    worker.join()
    train(ZOOptimizer(alike, lr=0.1), mean_square(alike, regression()))
    assert same(snapshot(model), snapshot(alike))
