"""Threads that read parameters in the middle of training: base weights, whatever the forward passes are on; and nobody waits forever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_models import Closure, Spy, next_token, same, sequence_model, snapshot, train
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import Mask, Where
from zo_lightning.engine.residency import Exact
from zo_lightning.engine.residency.scratch import OnScratch
from zo_lightning.engine.residency.turns import Turns

ON_SCRATCH = ("exact", "copy")


def third(name: str, tensor: Tensor) -> Tensor:
    return (torch.arange(tensor.numel()) % 3 == 1).view(tensor.shape)


@pytest.fixture(params=[None, Mask(Where(third))], ids=["dense", "lists"])
def mask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mask | None:
    monkeypatch.setattr("zo_lightning.engine.masks.rules.LIST_BELOW", 0.5)
    found: Mask | None = request.param
    return found


def trained(weights: str, lr: float = 0.0, mask: Mask | None = None) -> tuple[nn.Module, Closure, ZOOptimizer, OnScratch]:
    model = sequence_model("tied head")
    optimizer = ZOOptimizer(model, lr=lr, eps=0.1, weights=weights, mask=mask)
    residency = optimizer.residency
    assert isinstance(residency, OnScratch)
    return model, next_token(model), optimizer, residency


@pytest.mark.parametrize("weights", ON_SCRATCH)
def test_threads_that_read_all_the_time_see_base_weights_alone(weights: str, mask: Mask | None) -> None:
    model, loss, optimizer, residency = trained(weights, mask=mask)
    before, stop = snapshot(model), threading.Event()

    def hammer() -> list[bool]:
        looks = []
        while not stop.is_set():
            with residency.settled():
                looks.append(same(before, snapshot(model)))
        return looks

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(hammer) for _ in range(2)]
        try:
            train(optimizer, loss, 20)
        finally:
            stop.set()
        looks = [reader.result(timeout=60) for reader in readers]
    assert all(all(seen) for seen in looks)
    assert min(len(seen) for seen in looks) >= 20  # in turn with the evaluations: neither side starves


@pytest.mark.parametrize("weights", ON_SCRATCH)
def test_a_reader_waits_for_the_evaluation_to_end(weights: str) -> None:
    model, loss, optimizer, residency = trained(weights)
    before, order, reads = snapshot(model), [], []

    def read() -> None:
        with residency.settled():
            order.append("read")
            reads.append(same(before, snapshot(model)))

    def closure() -> Tensor:
        value = loss()
        order.append("forward ended")
        return value

    train(optimizer, loss, 1)  # the watched pass is over
    with ThreadPoolExecutor(1) as thread:
        tasks: list[object] = []

        def once(*args: object) -> None:
            if not tasks:
                tasks.append(thread.submit(read))

        model.blocks[0].register_forward_hook(once)
        train(optimizer, closure, 1)
    assert len(tasks) == 1
    assert order[0] == "forward ended"
    assert reads == [True]


@pytest.mark.parametrize("weights", ON_SCRATCH)
def test_the_evaluating_thread_itself_finds_base_weights_and_goes_on_with_the_perturbed_ones(weights: str, mask: Mask | None) -> None:
    values = []
    for look in (False, True):
        model, loss, optimizer, residency = trained(weights, lr=0.01, mask=mask)
        backs, spy = [], Spy(model)

        def inside(*args: object, residency: OnScratch = residency, backs: list[bool] = backs, spy: Spy = spy) -> None:
            with residency.settled(), residency.settled():
                backs.append(spy.back())
            with residency.settled():
                backs.append(spy.back())

        if look:
            model.blocks[1].norm.register_forward_hook(inside)
        values.append(train(optimizer, loss, 1))
        assert backs == [True] * len(backs)
        assert len(backs) == (2 * (3 if weights == "exact" else 2) if look else 0)
    assert values[0] == values[1]


def test_what_is_read_while_settled_is_no_use_of_the_weights() -> None:
    """A checkpoint that the closure saves during the watched pass does not make units of what it saves."""
    units = []
    for save in (False, True):
        model, loss, optimizer, residency = trained("exact")

        def closure(model: nn.Module = model, loss: Closure = loss, residency: OnScratch = residency, save: bool = save) -> Tensor:
            if save:
                with residency.settled():
                    snapshot(model)
            return loss()

        train(optimizer, closure, 1)
        assert isinstance(residency, Exact)
        units.append([[p.name for p in unit.parameters] for unit in residency.units])
    assert units[0] == units[1]


def test_a_closure_may_run_the_model_on_a_thread_of_its_own() -> None:
    values = []
    with ThreadPoolExecutor(1) as thread:
        for on_thread in (False, True):
            _, loss, optimizer, _ = trained("exact", lr=0.01)

            def closure(loss: Closure = loss, on_thread: bool = on_thread) -> Tensor:
                if not on_thread:
                    return loss()

                def ungraded() -> Tensor:
                    with torch.no_grad():
                        return loss()

                return thread.submit(ungraded).result(timeout=60)

            train(optimizer, closure, 1)
            values.append(train(optimizer, closure, 2))
    assert values[0] == values[1]


def test_turns_are_given_in_the_order_of_asking() -> None:
    turns, order = Turns(), []
    queued = [threading.Event() for _ in range(4)]

    def ask(number: int) -> None:
        queued[number].set()
        with turns.turn():
            order.append(number)

    threads = []
    with turns.turn():
        with turns.turn():
            pass
        for number in range(4):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            assert queued[number].wait(60)
            while len(turns._waiting) <= number:
                pass
    for thread in threads:
        thread.join(60)
    assert order == [0, 1, 2, 3]
    assert not turns._waiting


def test_a_thread_that_gives_up_waiting_leaves_the_queue() -> None:
    class Impatient(threading.Condition):
        def wait_for(self, predicate: object, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    turns = Turns()
    patient, turns._changed = turns._changed, Impatient(threading.Lock())
    with pytest.raises(KeyboardInterrupt), turns.turn():
        pass
    turns._changed = patient
    with turns.turn():
        assert not turns._waiting
