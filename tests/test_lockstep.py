"""Evaluations that take turns at the borders of blocks: each computes what it computes alone, and a block is read once for all."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from engine_models import same, snapshot
from test_offload import MODELS, loss_of, made
from torch import Tensor, nn

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.baton import Baton
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.residency import Offload, Offloaded

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
FLOAT = torch.float32


class Block(nn.Module):
    """Two matrices around whatever `between` does."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: x) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.between(self, torch.tanh(self.first(x))))


class Stack(nn.Module):
    """Blocks, and something done before, between and after them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(4)])
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(self.around(index, x))
        return self.around(len(self.blocks), x)

    def around(self, index: int, x: Tensor) -> Tensor:
        """What happens before block `index`."""
        return x


class Hides(Stack):
    """Keeps activations in attributes, containers, tensors and an object, and reads them blocks later."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.table: dict[str, Any] = {}
        self.last: deque[float] = deque(maxlen=2)
        self.tensor = torch.zeros(())
        self.store = type("Store", (), {})()

    def around(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            self.hidden, self.store.x, self.table["x"] = x.sum(), x.mean(), x.std()
            self.seen.append(x.max())
            self.last.append(float(x.min()))
            self.tensor.fill_(float(x.median()))
        elif index == 2:
            x = x + 0.1 * self.blocks[0].second.weight.sum()
            self.hidden, self.store.x = self.hidden + x.sum(), self.store.x + x.mean()
            self.table["x"] = self.table["x"] + x.std()
            self.tensor += x.norm()
        elif index == 4:
            x = x + 1e-2 * (self.hidden + self.store.x + self.table["x"] + self.seen.pop() + self.last.pop() + self.tensor)
            del self.hidden, self.store.x, self.table["x"]
            self.tensor.zero_()
        return x


class Patches(Stack):
    """Replaces the forward of a block during its own, as libraries that capture outputs do."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.blocks[3]
        plain, scale = block.forward, 1 + 0.01 * float(x.sum() + self.blocks[0](x).sum())
        block.forward = lambda y: scale * plain(y)
        try:
            return super().forward(x)
        finally:
            block.forward = plain


class Draws(Stack):
    """Randomness of every kind between the blocks."""

    def around(self, index: int, x: Tensor) -> Tensor:
        noise = random.random() + numpy.random.rand() + float(torch.rand(()))
        return nn.functional.dropout(x, 0.2) * (1 + 0.01 * noise)


class Normed(Stack):
    """Running statistics, and a buffer that is bound anew."""

    def __init__(self) -> None:
        super().__init__(*[nn.Sequential(Block(), nn.BatchNorm1d(16)) for _ in range(3)])
        self.register_buffer("mean", torch.zeros(16))

    def around(self, index: int, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x + 0.1 * self.mean


class Branches(Stack):
    """How many blocks run, and which, depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        for index in [0, 1, 2, 3, 2, 1, 3][: 3 + int(1e4 * float(self.blocks[0](x).sum().abs())) % 5]:
            x = self.blocks[index](x)
        return x


class Outer(Stack):
    """A matrix of the root itself, in use around all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(16, 16) / 8)

    def around(self, index: int, x: Tensor) -> Tensor:
        return x @ self.own


class Watched(Stack):
    """Counts in itself, what the next pass reads."""

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return super().forward(x) * (1 + 0.01 * self.step)


KINDS: dict[str, Callable[[], Stack]] = {
    kind.__name__.lower(): kind for kind in (Stack, Hides, Patches, Draws, Normed, Branches, Outer, Watched)
}


def built(kind: str, dtype: torch.dtype = FLOAT) -> Stack:
    torch.manual_seed(1)
    return KINDS[kind]().to(dtype).train()


def closure_of(model: nn.Module, dtype: torch.dtype = FLOAT) -> Callable[[], Tensor]:
    return lambda: model(X.to(dtype)).square().mean()


def optimizer_of(model: nn.Module, weights: Any = None, **options: Any) -> ZOOptimizer:
    weights = Offload(lockstep=options.pop("lockstep", None)) if weights is None else weights
    return ZOOptimizer(model, lr=1e-2, eps=1e-2, weights=weights, safeguard=None, **options)


def steps_of(model: nn.Module, optimizer: ZOOptimizer, count: int = 4, closure: Callable[[], Tensor] | None = None) -> list[Any]:
    found = []
    for _ in range(count):
        optimizer.estimate(closure or closure_of(model))
        report = optimizer.apply()
        assert report is not None
        found.append(report.values)
    return found


def read(optimizer: ZOOptimizer) -> int:
    assert isinstance(optimizer.residency, Offloaded)
    return optimizer.residency.traffic.read


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "watched"])
def test_it_computes_what_one_after_another_does(kind: str, queries: int) -> None:
    exact, streamed = built(kind), built(kind)
    one, other = (optimizer_of(m, w, estimator=SPSA(queries)) for m, w in ((exact, "exact"), (streamed, None)))
    assert steps_of(streamed, other) == steps_of(exact, one)
    assert same(snapshot(streamed), snapshot(exact))
    if kind == "branches":
        return  # passes on paths that were not taken before are watched, one by one
    here = on_this_thread(streamed)
    assert steps_of(streamed, other) == steps_of(exact, one)
    assert same(snapshot(streamed), snapshot(exact))
    assert here.count(True) == 4
    assert here.count(False) == 4 * (2 * queries - 1)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_block_is_read_once_for_all_evaluations(kind: str, dtype: torch.dtype) -> None:
    for queries in (1, 2):
        found = []
        for lockstep in (None, False):
            model = made(kind, dtype)
            optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=Offload(lockstep=lockstep), estimator=SPSA(queries))
            optimizer.step(loss_of(model))
            optimizer.step(loss_of(model))
            before = read(optimizer)
            losses = [float(optimizer.step(loss_of(model)) or 0) for _ in range(3)]
            found.append((read(optimizer) - before, losses, snapshot(model)))
        (once, losses, weights), (each, others, alone) = found
        assert once * 2 * queries == each
        assert losses == others
        assert same(weights, alone)


def on_this_thread(model: Stack) -> list[bool]:
    """Of each of its forward passes from now on, whether it runs here."""
    here = threading.get_ident()
    found: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: found.append(threading.get_ident() == here))
    return found


@pytest.mark.filterwarnings("ignore:weights=Offload... the evaluations of a step run one after another")
def test_state_that_the_next_pass_reads_keeps_them_one_after_another() -> None:
    exact, streamed = built("watched"), built("watched")
    here = on_this_thread(streamed)
    one, other = optimizer_of(exact, "exact"), optimizer_of(streamed)
    assert steps_of(streamed, other) == steps_of(exact, one)
    assert all(here)
    assert streamed.step == exact.step


def test_it_is_said_why_not() -> None:
    model = built("watched")
    optimizer = optimizer_of(model)
    with pytest.warns(ZOWarning, match=r"one after another, each reads every block: forward passes change Python attributes"):
        steps_of(model, optimizer)


def test_asked_for_and_not_possible_is_an_error() -> None:
    model = built("watched")
    optimizer = optimizer_of(model, lockstep=True)
    with pytest.raises(ValueError, match=r"lockstep=True: .* Python attributes .* Leave lockstep= out"):
        steps_of(model, optimizer)


def test_a_torch_mode_keeps_them_one_after_another() -> None:
    model = built("stack")
    here, optimizer = on_this_thread(model), optimizer_of(model)
    with torch.device("cpu"), pytest.warns(ZOWarning, match="a torch mode is active"):
        steps_of(model, optimizer, 2)
    assert all(here)
    steps_of(model, optimizer, 2)
    assert not all(here)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where: str) -> None:
    found = []
    for weights in ("exact", None):
        model = built("outer")
        optimizer = optimizer_of(model, weights)

        def cast(model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return closure_of(model)()

        if where == "around":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = steps_of(model, optimizer)
        else:
            values = steps_of(model, optimizer, closure=cast)
        found.append((values, snapshot(model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_generators_of_the_host_come_back() -> None:
    model = built("draws")
    optimizer = optimizer_of(model)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    steps_of(model, optimizer, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.random.get_state()[1].tolist() == before[2]


def failing(model: Stack, block: int, side: int, error: Callable[[], None]) -> Any:
    """Block number `block` fails in evaluation number `side` of a step."""
    calls = [0]

    def hook(module: nn.Module, args: Any) -> None:
        if calls[0] == side:
            error()
        calls[0] += 1

    return model.blocks[block].first.register_forward_pre_hook(hook)


def throw() -> None:
    raise RuntimeError("on purpose")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("error", "raised"), [(throw, RuntimeError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("block", range(4))
def test_an_error_in_one_of_them(block: int, side: int, error: Callable[[], None], raised: type[BaseException]) -> None:
    model, twin = built("outer"), built("outer")
    optimizer, exact = optimizer_of(model), optimizer_of(twin, "exact")
    steps_of(model, optimizer, 2)
    steps_of(twin, exact, 2)
    before = threading.active_count()
    hook = failing(model, block, side, error)
    with pytest.raises(raised):
        optimizer.estimate(closure_of(model))
    hook.remove()
    optimizer.discard()
    assert threading.active_count() <= before
    assert same(snapshot(model), snapshot(twin))
    assert steps_of(model, optimizer, 2) == steps_of(twin, exact, 2)
    assert same(snapshot(model), snapshot(twin))
    assert isinstance(optimizer.residency, Offloaded)
    assert not any(optimizer.residency._users.values())


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("lockstep", [None, False])
def test_a_forward_pass_that_was_interrupted_leaves_no_block_without_its_update(lockstep: bool | None, beside: bool) -> None:
    model, twin = built("stack"), built("stack")
    optimizer, exact = optimizer_of(model, lockstep=lockstep), optimizer_of(twin, "exact")
    steps_of(model, optimizer, 2)
    steps_of(twin, exact, 3)
    optimizer.estimate(closure_of(model))
    residency = optimizer.residency
    hook = failing(model, 2, 0, interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(X) if beside else optimizer.estimate(closure_of(model))
    hook.remove()
    optimizer.apply()
    with torch.no_grad():  # by a forward pass, and not by who saves
        assert torch.equal(model(X), twin(X))
    assert optimizer.residency is residency  # it was found where it was left
    assert same(snapshot(model), snapshot(twin))


def test_ends_come_in_the_order_of_the_points() -> None:
    model = built("stack")
    optimizer = optimizer_of(model, estimator=SPSA(2))
    ends: list[float] = []

    def closure() -> Tensor:
        loss = closure_of(model)()
        ends.append(float(loss))
        return loss

    steps_of(model, optimizer, 2, closure)
    ends.clear()
    (values,) = steps_of(model, optimizer, 1, closure)
    assert tuple(ends) == values


def test_another_thread_finds_base_weights() -> None:
    model, twin = built("stack"), built("stack")
    optimizer, exact = optimizer_of(model), optimizer_of(twin, "exact")
    steps_of(model, optimizer, 2)
    steps_of(twin, exact, 2)
    found: list[dict[str, Tensor]] = []

    def reader() -> None:
        with optimizer.settled():
            found.append(snapshot(model))

    started: list[threading.Thread] = []

    def start(module: nn.Module, args: Any) -> None:
        if len(started) < 2:
            started.append(threading.Thread(target=reader))
            started[-1].start()

    model.blocks[2].register_forward_pre_hook(start)
    optimizer.estimate(closure_of(model))
    for thread in started:
        thread.join()
    assert len(found) == 2
    assert all(same(one, snapshot(twin)) for one in found)


def test_settled_inside_a_closure() -> None:
    model, twin = built("outer"), built("outer")
    optimizer, exact = optimizer_of(model), optimizer_of(twin, "exact")
    found: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        with optimizer.settled():
            found.append(same(snapshot(model), snapshot(twin)))

    hook = model.blocks[1].first.register_forward_pre_hook(look)
    values = steps_of(model, optimizer, 1)
    hook.remove()
    assert found
    assert all(found)
    assert values + steps_of(model, optimizer, 2) == steps_of(twin, exact, 3)


def test_a_loss_of_none_skips() -> None:
    model = built("stack")
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, 2)
    assert optimizer.estimate(closure_of(model), loss_of=lambda output: None).loss is None
    assert optimizer.apply() is None


class TestBaton:
    """Jobs of letters and borders: what the order of the letters is."""

    crew = ThreadPoolExecutor(3)

    def run(self, *jobs: str) -> str:
        seen: list[str] = []
        switches: list[tuple[int | None, int | None]] = []
        baton = Baton(lambda old, new: switches.append((old, new)), self.crew)

        def job(text: str) -> Callable[[], str]:
            def body() -> str:
                for letter in text:
                    if letter == "|":
                        baton.border()
                    elif letter == "!":
                        raise ValueError(text)
                    else:
                        seen.append(letter)
                return text

            return body

        try:
            assert baton.run([job(text) for text in jobs]) == list(jobs)
        except ValueError as error:
            seen.append(f" {error}")
        assert [new for _, new in switches[:-1]] == [old for old, _ in switches[1:]]
        assert switches[-1][1] is None
        return "".join(seen)

    def test_borders(self) -> None:
        assert self.run("a|b|c", "A|B|C") == "abABcC"
        assert self.run("a|b|c", "1|2|3", "A|B|C") == "ab12ABc3C"

    def test_ends(self) -> None:
        assert self.run("ab", "A|B|C") == "abABC"
        assert self.run("a|b|c", "A") == "abAc"
        assert self.run("a") == "a"

    def test_errors(self) -> None:
        assert self.run("a|b!|c", "A|B|C") == "ab a|b!|c"
        assert self.run("a|b|c", "A|B!|C", "x|y|z") == "abABc A|B!|C"
        assert self.run("a|b|c", "A|B|C", "x!|y") == "abABxcC x!|y"
