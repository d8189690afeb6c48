"""Perturbed weights on scratch, copied and in place: each against weights that are perturbed by hand, and never seen by anybody else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_models import (
    RESIDENCIES,
    SEQUENCE_MODELS,
    STEPS,
    STREAMED,
    TASKS,
    Closure,
    LanguageModel,
    Spy,
    bits,
    by_hand,
    distance,
    mean_square,
    mlp,
    next_token,
    regression,
    same,
    sequence_model,
    snapshot,
    task,
    train,
)
from reference.spsa import Settings
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer

ON_SCRATCH = ("exact", "copy")


# ---- each against weights that are perturbed by hand


@pytest.mark.filterwarnings("ignore:.*run one after another")  # weight norm changes an attribute in every pass
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_every_residency_is_perturbing_by_hand(name: str, weights: Any, training: bool) -> None:
    """Bit for bit on scratch; in place up to the rounding of a move, which the slope divides by 2 eps."""
    model, loss = task(name)
    model.train(training)
    expected, losses = by_hand(model, TASKS[name][1], Settings(0.01))
    got = train(ZOOptimizer(model, lr=0.01, weights=weights), loss)
    tolerance = 1e-10 if weights == "inplace" else 1e-14
    assert got == [pytest.approx(row, rel=tolerance, abs=tolerance) for row in losses]
    trained = snapshot(model)
    for parameter, weight in expected.items():
        torch.testing.assert_close(trained[parameter], weight, rtol=0, atol=100 * tolerance)
    assert min(abs(plus - minus) for plus, minus in losses) > 1e-7  # the perturbation is seen at all


@pytest.mark.parametrize("name", TASKS)
def test_exact_and_copy_train_the_same_bits(name: str) -> None:
    results = []
    for weights in ON_SCRATCH:
        model, loss = task(name)
        results.append((train(ZOOptimizer(model, lr=0.01, weights=weights), loss), snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_perturbation_larger_than_the_weights_is_seen_by_every_one_of_them(weights: str) -> None:
    """At eps 1e-3 a weight that is left out could hide in the difference; at eps 1 none can."""
    for name in SEQUENCE_MODELS:
        model, loss = task(name)
        _, losses = by_hand(model, next_token, Settings(0.0, eps=1.0), 1)
        got = train(ZOOptimizer(model, lr=0.0, eps=1.0, weights=weights), loss, 1)
        assert got == [pytest.approx(row, rel=1e-12) for row in losses]


# ---- the base weights


@pytest.mark.parametrize("weights", ON_SCRATCH)
@pytest.mark.parametrize("name", TASKS)
def test_base_weights_are_the_same_bits_during_and_after_an_evaluation(name: str, weights: str) -> None:
    model, loss = task(name)
    spy = Spy(model)
    optimizer = ZOOptimizer(model, weights=weights)
    optimizer.estimate(loss)
    optimizer.estimate(loss)
    assert len(spy.looks) >= 4
    assert all(spy.looks)
    assert spy.back()


READ_BY_ITS_OWNER_ALONE = ["tied head", "LSTM", "nn.TransformerEncoder", "blocks called twice", "no blocks"]


@pytest.mark.parametrize("name", READ_BY_ITS_OWNER_ALONE)
def test_exact_points_back_after_each_forward(name: str) -> None:
    """A checkpoint that is saved in the closure, after the forward, has the base weights."""
    model, loss = task(name)
    spy = Spy(model)
    saved = []

    def closure() -> Tensor:
        value = loss()
        saved.append(spy.back())
        return value

    train(ZOOptimizer(model, lr=0.0, weights="exact"), closure)
    assert saved == [True] * (2 * STEPS + 1)  # one forward is watched beforehand


def test_another_thread_reads_base_weights_in_the_middle_of_every_forward() -> None:
    model, loss = task("tied head")
    spy, reads = Spy(model), []
    with ThreadPoolExecutor(1) as thread:
        model.blocks[0].up.register_forward_hook(lambda *args: reads.append(thread.submit(spy.unperturbed).result()))
        train(ZOOptimizer(model, lr=0.0, weights="exact"), loss)
    assert reads == [True] * (2 * STEPS + 1)


def test_an_exception_that_the_model_handles_itself_points_back_too() -> None:
    """A fallback in the model's own code: what comes after it, in the same closure, sees the base weights."""
    model, handled = mlp(), []
    spy = Spy(model)

    def closure() -> Tensor:
        value = mean_square(model, regression())()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model[3](torch.zeros(2, 3, dtype=torch.float64))
        handled.append(spy.back())
        return value

    train(ZOOptimizer(model, lr=0.0, weights="exact"), closure)
    assert handled == [True] * (2 * STEPS + 1)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_two_parameters_over_one_storage_are_displaced_as_one(weights: str) -> None:
    """As after loading with mmap or sharing memory by hand: compared with a model whose layers have the very same parameter."""
    results = []
    for share in (lambda weight: weight, lambda weight: nn.Parameter(weight.data)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Tanh(), nn.Linear(10, 10, bias=False), nn.Linear(10, 1)).double()
        model[2].weight = share(model[0].weight)
        pointers = [layer.weight.data_ptr() for layer in (model[0], model[2])]
        values = train(ZOOptimizer(model, lr=0.1, weights=weights), mean_square(model, regression()))
        assert [layer.weight.data_ptr() for layer in (model[0], model[2])] == pointers
        results.append((values, snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


# ---- hooks of the user


def test_hooks_of_the_user_see_the_weights_that_the_forward_uses() -> None:
    """Whatever they were registered as, they run between ours: what they read is what is probed."""
    seen: dict[str, list[Tensor]] = {}

    def note(kind: str) -> Callable[..., None]:
        return lambda module, *args: seen.setdefault(kind, []).append(module.norm.weight.detach().clone())

    model, loss = task("tied head")
    block = model.blocks[0]
    block.register_forward_pre_hook(note("pre"))
    block.register_forward_pre_hook(note("prepended"), prepend=True)
    block.register_forward_hook(note("post"))
    block.register_forward_hook(note("always"), always_call=True)
    optimizer = ZOOptimizer(model, lr=0.0, eps=0.5, weights="exact")
    train(optimizer, loss, 1)
    values = [torch.stack(copies[1:]) for copies in seen.values()]  # without the watched pass
    assert sorted(seen) == ["always", "post", "pre", "prepended"]
    for value in values:
        assert torch.equal(value, values[0])
        assert torch.equal((value - 1).abs(), torch.full_like(value, 0.5))


def test_a_hook_that_raises_leaves_the_weights() -> None:
    model, loss = task("tied head")

    def broken(*args: object) -> None:
        raise ValueError("a broken hook")

    before = snapshot(model)
    for register in (model.blocks[0].register_forward_pre_hook, model.blocks[0].up.register_forward_hook):
        handle = register(broken)
        with pytest.raises(ValueError, match="a broken hook"):
            ZOOptimizer(model, weights="exact").estimate(loss)
        handle.remove()
        assert same(before, snapshot(model))


# ---- in place


def test_in_place_weights_return_up_to_rounding_and_drift_little() -> None:
    """A cycle has three moves, each off by half a unit in the last place of a weight below 2 at most. Their errors have random signs."""
    model = sequence_model("tied head", torch.float32)
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.0, weights="inplace")
    optimizer.estimate(next_token(model))
    assert 0 < distance(before, snapshot(model)) <= 3 * 2.0**-24 + 2.0**-24
    for _ in range(99):
        optimizer.step(next_token(model))
    drift = torch.cat([(weight - before[name]).flatten() for name, weight in snapshot(model).items()])
    assert float(drift.square().mean().sqrt()) < 1e-3 * optimizer.eps


def test_in_place_moves_that_need_no_rounding_leave_every_bit() -> None:
    """Weights on a grid and eps a power of two: a move that went wrong could not hide in the rounding."""
    model, loss = task("no blocks")
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 1024).round() / 1024)
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.0, eps=2.0**-8, weights="inplace")
    optimizer.estimate(loss)
    assert same(before, snapshot(model))
    optimizer.step(loss)  # one pass restores and updates
    assert same(before, snapshot(model))


def test_in_place_steps_restore_and_update_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["zo_lightning.engine.residency.inplace"]
    real, sweeps = module.sweep, []

    def counted(items: Sequence[object], *args: object, **more: object) -> None:
        sweeps.append(len(items))
        real(items, *args, **more)

    monkeypatch.setattr(module, "sweep", counted)
    model, loss = task("no blocks")
    optimizer = ZOOptimizer(model, lr=0.01, weight_decay=0.1, weights="inplace")
    optimizer.step(loss)
    assert sweeps == [3, 3, 3]
    optimizer.step(lambda: torch.tensor(float("nan")))  # nothing to fuse with: restored all the same
    assert sweeps == [3] * 6


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_skipped_step_leaves_the_weights(weights: str) -> None:
    model, loss = task("tied head")
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weight_decay=0.5, weights=weights)
    optimizer.step(lambda: loss() * torch.tensor(float("inf")))
    assert optimizer.skipped_steps == 1
    assert distance(before, snapshot(model)) <= (1e-15 if weights == "inplace" else 0.0)


# ---- weights that others change


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("how", ["written", "another tensor", "loaded", "frozen and back"])
def test_weights_changed_between_steps_are_used_as_they_are(how: str, weights: str) -> None:
    """Loading the best model, averaging and the learning-rate finder all do this."""
    model, loss = task("tied head")
    optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
    optimizer.step(loss)
    other = sequence_model("tied head", seed=5)
    if how == "loaded":
        model.load_state_dict(other.state_dict())
    elif how == "frozen and back":
        model.embed.weight.requires_grad_(False)
        frozen = bits(model.embed.weight).clone()
        optimizer.step(loss)
        assert torch.equal(bits(model.embed.weight), frozen)
        model.embed.weight.requires_grad_(True)
        model.load_state_dict(other.state_dict())
        optimizer.steps = 1
    else:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if how == "written":
                mine.data.copy_(theirs.data)
            else:
                mine.data = theirs.data.clone()
    twin = ZOOptimizer(other, lr=0.01, weights=weights)
    twin.steps = 1
    assert train(optimizer, loss) == train(twin, next_token(other))
    assert same(snapshot(model), snapshot(other))


# ---- memory


def scratch_bytes(model: nn.Module, weights: str, loss: Closure) -> int:
    """The memory that weights are on during forwards, beside their own."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    scratch: dict[int, int] = {}

    def look(module: nn.Module, *args: object) -> None:
        for weight in module.parameters(recurse=False):
            storage = weight.untyped_storage()
            if storage.data_ptr() not in own:
                scratch[storage.data_ptr()] = storage.nbytes()

    for module in model.modules():
        module.register_forward_hook(look)
    train(ZOOptimizer(model, weights=weights), loss)
    return sum(scratch.values())


def test_scratch_is_the_size_of_the_largest_unit() -> None:
    sizes = {}
    for weights in ON_SCRATCH:
        model = LanguageModel(blocks=6, width=32, head="tied")
        sizes[weights] = scratch_bytes(model, weights, next_token(model))
    block = sum(weight.nbytes for weight in model.blocks[0].parameters())
    assert block <= sizes["exact"] <= 1.125 * block  # the weights that are read outside of blocks have buffers of their own
    assert sizes["copy"] > 6 * block


def test_scratch_of_units_that_grow_is_that_of_the_largest_alone() -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.Linear(64, 20), nn.Linear(20, 90), nn.Linear(90, 60), nn.Linear(60, 1)).double()
    largest = sum(weight.nbytes for weight in model[3].parameters())
    assert largest <= scratch_bytes(model, "exact", mean_square(model, regression())) <= largest + 4 * 64
