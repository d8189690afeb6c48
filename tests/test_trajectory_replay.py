"""Replay is training without forward passes: the same bits, from any state the log knows, and a clear word where it can't be."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import LanguageModel, bits, mean_square, mlp, next_token, regression, same, snapshot
from torch import Tensor, nn
from trajectory_tools import Recorder, made_up_steps, segment_of, trained_of

from zo_lightning.engine import SPSA, Rademacher, ZOOptimizer, ZOWarning, messages
from zo_lightning.engine.noise import Item, sweep
from zo_lightning.engine.seeds import parameter_key, query_seed, rounding_seed
from zo_lightning.engine.trajectory import (
    End,
    LogWriter,
    Mark,
    frozen_fingerprint,
    load_base,
    read_log,
    replay,
    save_base,
    trained_fingerprint,
    undo,
    verify,
)
from zo_lightning.engine.trajectory import steps as steps_module

pytestmark = pytest.mark.filterwarnings("ignore:Some trained weights are 16-bit")


def closure_of(model: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A new batch at every call of the factory; no loss is finite at the fourth."""
    count = itertools.count()

    def closure() -> Tensor:
        loss = mean_square(model, regression(dtype))().float()
        return loss * math.nan if next(count) // 2 == 3 else loss + 0.01 * loss**2

    return closure


def groups_of(model: nn.Sequential) -> list[dict[str, object]]:
    """Two groups with settings of their own; the second one decays."""
    named = list(model.named_parameters())
    return [{"params": named[:1], "eps": 2e-3}, {"params": named[1:], "lr": 3e-3, "weight_decay": 0.1}]


def run(tmp_path: Path, weights: str, dtype: torch.dtype, noise: str, queries: int, clip: float | None = None) -> tuple[nn.Module, Path]:
    """Seven steps, fused ones and accumulated ones, lr and eps changing, with fingerprints on the way."""
    model = mlp(dtype=dtype)
    optimizer = ZOOptimizer(groups_of(model), lr=0.02, weights=weights, noise=noise, estimator=SPSA(queries), clip=clip, module=model)
    path = tmp_path / "run.zolog"
    recorder = Recorder(optimizer, path)
    closure = closure_of(model, dtype)
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.param_groups[1]["eps"] = 1e-3 * (1 + step // 4)
        if step % 3 == 2:
            recorder.estimate(closure, 0.5)
            recorder.estimate(closure, 0.5)
            recorder.step(None)
        else:
            recorder.step(closure)
        if step % 2:
            recorder.writer.append(Mark(step + 1, trained_fingerprint(trained_of(optimizer))))
    recorder.writer.append(End(7, trained_fingerprint(trained_of(optimizer))))
    recorder.writer.close()
    return model, path


CASES = [
    (weights, dtype, noise, queries)
    for weights in ("exact", "copy", "inplace")
    for dtype in (torch.float32, torch.bfloat16)
    for noise in ("rademacher", "gaussian")
    for queries in (1, 3)
    if weights != "copy" or queries == 3
]


@pytest.mark.parametrize(("weights", "dtype", "noise", "queries"), CASES, ids=str)
def test_replay_makes_the_bits_that_training_made(weights: str, dtype: torch.dtype, noise: str, queries: int, tmp_path: Path) -> None:
    """Weight decay, two groups, a schedule of lr and eps, accumulation, skipped steps; a clip that some gradients meet."""
    tuned, path = run(tmp_path, weights, dtype, noise, queries, clip=5.0)
    log = read_log(path)
    assert any(step.skipped for step in log.steps)
    assert not all(step.skipped for step in log.steps)
    model = mlp(dtype=dtype)
    assert replay(model, path) == 7
    assert same(snapshot(model), snapshot(tuned))
    assert not same(snapshot(mlp(dtype=dtype)), snapshot(tuned))


@pytest.mark.parametrize("weights", ["exact", "inplace"])
def test_an_optimizer_and_a_table_of_tensors_are_replayed_as_a_module_is(weights: str, tmp_path: Path) -> None:
    tuned, path = run(tmp_path, weights, torch.float32, "rademacher", 1)
    model = mlp(dtype=torch.float32)
    optimizer = ZOOptimizer(groups_of(model), lr=0.1, weights=weights, module=model)
    assert replay(optimizer, path) == 7
    assert same(snapshot(model), snapshot(tuned))
    prefixed = {f"model.{name}": tensor for name, tensor in snapshot(mlp(dtype=torch.float32)).items()}
    assert replay(prefixed, path) == 7
    assert all(torch.equal(bits(prefixed[f"model.{name}"]), bits(tensor)) for name, tensor in snapshot(tuned).items())


def test_replay_goes_on_from_any_state_that_has_a_fingerprint(tmp_path: Path) -> None:
    tuned, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    model = mlp(dtype=torch.float32)
    assert replay(model, path, to_step=2) == 2  # a mark stands there
    halfway = snapshot(model)
    assert not same(halfway, snapshot(tuned))
    assert replay(model, path) == 7
    assert same(snapshot(model), snapshot(tuned))
    assert replay(model, path) == 7  # nothing is left to do
    assert same(snapshot(model), snapshot(tuned))


def test_undo_goes_back_to_any_step(tmp_path: Path) -> None:
    model, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    for step in (5, 0, 3):
        expected = mlp(dtype=torch.float32)
        assert replay(expected, path, step) == step
        assert undo(model, path, step) == step  # from the file that the log names
        assert same(snapshot(model), snapshot(expected))
    assert undo(model, path, 6, base=snapshot(mlp(dtype=torch.float32))) == 6
    assert undo(model, path, 6, base=path.with_suffix(".base.safetensors")) == 6


def test_undo_needs_a_base_and_says_so(tmp_path: Path) -> None:
    model, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    before = snapshot(model)
    path.with_suffix(".base.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights from before are needed.*not beside it.*Pass base="):
        undo(model, path, 3)
    with pytest.raises(ValueError, match="in none of the states"):
        undo(model, path, 3, base=snapshot(mlp(dtype=torch.float32, seed=1)))
    with pytest.raises(ValueError, match="past to_step=3"):
        undo(model, path, 3, base=before)
    with pytest.raises(ValueError, match="Invalid to_step: 8"):
        undo(model, path, 8)
    assert same(before, snapshot(model))


def test_verify_tells_the_first_place_that_disagrees(tmp_path: Path) -> None:
    _, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    found = verify(mlp(dtype=torch.float32), path)
    assert (found.step, found.checked, found.ok) == (7, 4, True)
    log = read_log(path)
    log.records = [Mark(4, "0" * 64) if isinstance(r, Mark) and r.step == 4 else r for r in log.records]
    found = verify(mlp(dtype=torch.float32), log)
    assert (found.step, found.checked, found.ok) == (4, 1, False)
    assert "after 4 steps" in str(found.problem)


def test_weights_that_the_log_does_not_know_are_refused(tmp_path: Path) -> None:
    _, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    other = mlp(dtype=torch.float32, seed=1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"none of the states.*step 0 \(run\.base\.safetensors\)"):
        replay(other, path)
    assert same(before, snapshot(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("3.bias"), r"'3\.bias' of the step log is not in the model"),
        (lambda t: t.update({"3.bias": torch.zeros(2)}), r"'3\.bias' has shape \(2,\) here and \(1,\) in the step log"),
        (lambda t: t.update({"3.bias": torch.zeros(1).half()}), r"'3\.bias' has dtype float16 here and float32 in the step log"),
        (lambda t: t.update({"3.bias": torch.zeros(1, device="meta")}), r"'3\.bias' is on the meta device"),
    ],
)
def test_a_parameter_that_differs_is_named(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    _, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    tensors = snapshot(mlp(dtype=torch.float32))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        replay(tensors, path)


def test_an_optimizer_that_trains_more_than_the_log_is_refused(tmp_path: Path) -> None:
    model = mlp(dtype=torch.float32)
    model[0].requires_grad_(False)
    recorder = Recorder(ZOOptimizer(model, lr=0.1), tmp_path / "log")
    recorder.step(mean_square(model, regression(torch.float32)))
    with pytest.raises(ValueError, match=r"'0\.weight' is trained here, but not in the step log"):
        replay(ZOOptimizer(mlp(dtype=torch.float32), lr=0.1), tmp_path / "log")
    whole = mlp(dtype=torch.float32)
    replay(whole, tmp_path / "log")
    assert same(snapshot(whole), snapshot(model))
    recorder.writer.close()


def test_weights_that_were_changed_between_steps_are_loaded_from_their_base(tmp_path: Path) -> None:
    """And without the file replay stops where the change is, on the weights before it."""
    model, closure = mlp(dtype=torch.float32), None
    optimizer = ZOOptimizer(model, lr=0.05, weights="exact")
    recorder = Recorder(optimizer, tmp_path / "log")
    closure = mean_square(model, regression(torch.float32))
    recorder.step(closure)
    recorder.step(closure)
    before = snapshot(model)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    save_base(tmp_path / "second", trained_of(optimizer))
    recorder.writer.append(segment_of(optimizer, "second"))
    recorder.step(closure)
    recorder.writer.close()
    for start in (mlp(dtype=torch.float32), None):
        if start is None:
            start = mlp(dtype=torch.float32)
            start.load_state_dict(load_base(tmp_path / "second"))
        assert replay(start, tmp_path / "log") == 3
        assert same(snapshot(start), snapshot(model))
    goal = mlp(dtype=torch.float32)
    replay(goal, tmp_path / "log", 1)
    other = copy.deepcopy(model)
    assert undo(other, tmp_path / "log", 1) == 1  # the second base is of a later step
    assert same(snapshot(other), snapshot(goal))
    (tmp_path / "second").unlink()
    stopped = mlp(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"At step 2 the run went on from other weights.*now those after 2 steps"):
        replay(stopped, tmp_path / "log")
    assert same(snapshot(stopped), before)


def test_weights_that_were_put_back_to_the_start_are_those_of_the_last_time(tmp_path: Path) -> None:
    """The log has these weights twice: at its beginning, and where somebody loaded them again."""
    model = mlp(dtype=torch.float32)
    recorder = Recorder(ZOOptimizer(model, lr=0.05, weights="exact", module=model), tmp_path / "log")
    closure = mean_square(model, regression(torch.float32))
    recorder.step(closure)
    model.load_state_dict(mlp(dtype=torch.float32).state_dict())
    recorder.writer.append(segment_of(recorder.optimizer))
    recorder.step(closure)
    recorder.writer.close()
    again = mlp(dtype=torch.float32)
    assert replay(again, tmp_path / "log") == 2
    assert same(snapshot(again), snapshot(model))


def test_tied_weights_and_embeddings_are_replayed_once(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = LanguageModel("tied")
    start = {name: tensor.clone() for name, tensor in snapshot(model).items()}
    recorder = Recorder(ZOOptimizer(model, lr=0.01, weights="exact"), tmp_path / "log")
    for _ in range(3):
        recorder.step(next_token(model))
    recorder.writer.close()
    again = LanguageModel("tied")
    again.load_state_dict(start)
    assert replay(again, tmp_path / "log") == 3
    assert same(snapshot(again), snapshot(model))


def test_gaussian_noise_of_another_torch_is_said_to_differ_in_its_last_bits(tmp_path: Path) -> None:
    _, path = run(tmp_path, "exact", torch.float32, "gaussian", 1)
    log = read_log(path)
    vars(log.records[0])["versions"] = {"torch": "1.0", "zo_lightning": "0"}
    with pytest.warns(ZOWarning, match=r"last bits only \(torch 1\.0 in the log"):
        replay(mlp(dtype=torch.float32), log)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"estimator": {"name": "other", "options": {}}}, "estimator 'other'. This release knows 'spsa'"),
        ({"estimator": {"name": "spsa", "options": {"querys": 1}}}, "option 'querys'"),
        ({"estimator": {"name": "spsa", "options": {"queries": 0}}}, "Invalid queries: 0"),
        ({"estimator": {"name": "spsa", "options": {"queries": 2}}}, "has 2 values; its estimator evaluates 4 points"),
        ({"rule": {"name": "sgd", "options": {"clip": "x"}}}, "Invalid clip: 'x'"),
        ({"noise": "pink"}, "noise='pink' of the step log is not known"),
    ],
)
def test_what_this_release_does_not_know_is_refused_by_name(part: dict[str, object], message: str, tmp_path: Path) -> None:
    _, path = run(tmp_path, "exact", torch.float32, "rademacher", 1)
    log = read_log(path)
    vars(log.records[0]).update(part)
    with pytest.raises(ValueError, match=message):
        replay(mlp(dtype=torch.float32), log)


def test_another_model_around_the_same_trained_weights_is_said(tmp_path: Path) -> None:
    """The frozen part is no part of the replay, and decides what the tuned weights are worth."""

    def half_frozen() -> nn.Module:
        model = mlp(dtype=torch.float32)
        model[0].requires_grad_(False)
        return model

    model = half_frozen()
    optimizer = ZOOptimizer(model, lr=0.1)
    segment = replace(segment_of(optimizer), frozen=frozen_fingerprint(model, trained_of(optimizer)))
    with LogWriter.create(tmp_path / "log", segment) as writer:
        writer.append(made_up_steps(1, groups=1)[0])
    assert replay(half_frozen(), tmp_path / "log") == 1  # warnings are errors
    for wrap in (lambda model: model, ZOOptimizer):
        other = half_frozen()
        with torch.no_grad():
            other[0].weight.add_(1)
        messages.reset()
        with pytest.warns(ZOWarning, match="What the step log does not train"):
            assert replay(wrap(other), tmp_path / "log") == 1


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_updates_are_rounded_as_the_log_says(rounding: str, tmp_path: Path) -> None:
    """Against single sweeps, each with the rounding seed of its step."""
    start = mlp(dtype=torch.bfloat16)
    optimizer = ZOOptimizer(start, lr=1e-3, weights="exact", seed=5, module=start)
    steps = made_up_steps(4, groups=1)
    with LogWriter.create(tmp_path / "log", segment_of(optimizer, rounding=rounding)) as writer:
        for step in steps:
            writer.append(step)
    expected = mlp(dtype=torch.bfloat16)
    masters = {parameter_key(name): p.detach().float() for name, p in expected.named_parameters()}
    for step in steps:
        seed = query_seed(5, step.step, 0)
        c = -step.settings[0].lr * ((step.values[0] - step.values[1]) / 2 / step.settings[0].eps)
        weights = [(parameter_key(name), p.detach()) for name, p in expected.named_parameters()]
        kept = [masters[key] if rounding == "stochastic" and weight.dim() < 2 else weight for key, weight in weights]
        items = [Item(place, place, key, 1.0, (c,)) for (key, _), place in zip(weights, kept, strict=True)]
        sweep(items, [seed], Rademacher(), rounding=rounding_seed(5, step.step) if rounding == "stochastic" else None)
        for (_, weight), place in zip(weights, kept, strict=True):
            weight.copy_(place)
    model = mlp(dtype=torch.bfloat16)
    assert replay(model, tmp_path / "log") == 4
    assert same(snapshot(model), snapshot(expected))


def test_batches_of_updates_are_the_single_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, path = run(tmp_path, "exact", torch.bfloat16, "rademacher", 3)
    for batch in (1, 2, 5):
        monkeypatch.setattr(steps_module, "BATCH", batch)
        model = mlp(dtype=torch.bfloat16)
        replay(model, path)
        assert same(snapshot(model), snapshot(tuned))
