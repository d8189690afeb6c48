"""The safeguard: a diverging run is stopped, halved or mentioned; a noisy but healthy one never."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from engine_models import RESIDENCIES, mean_square, mlp, regression
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zo_lightning.engine import SPSA, DivergenceError, Safeguard, ZOOptimizer, ZOWarning, messages

USUAL = "1e-4 to 1e-2 for less than ten million parameters"


def feed(safeguard: Safeguard, losses: Iterable[float]) -> int:
    """How many losses were taken in before the safeguard stopped the run."""
    taken = 0
    for loss in losses:
        safeguard.watch(loss, 0.5, lambda: USUAL)
        taken += 1
    return taken


def train(optimizer: ZOOptimizer, closure: Callable[[], Tensor | float], steps: int) -> list[float]:
    """The losses of some steps."""
    return [float(optimizer.step(closure)) for _ in range(steps)]  # type: ignore[arg-type]


def triggers(safeguard: Safeguard, losses: Iterable[float]) -> bool:
    try:
        feed(safeguard, losses)
    except DivergenceError:
        return True
    return False


# ---- when it acts


@pytest.mark.parametrize(
    ("start", "later", "tolerance", "diverges"),
    [
        ([1.0, 1.0], [1.2, 1.2], 0.2, False),
        ([1.0, 1.0], [1.21, 1.21], 0.2, True),
        ([1.0, 1.0], [1.0, 1.42], 0.2, False),  # s' = 0.29..., so the bound is 1 + 0.63
        ([1.0, 1.0], [1.9, 2.0], 0.2, True),
        ([1.0, 1.0], [1.21, 1.21], 0.3, False),
        ([0.5, 1.5], [3.8, 3.8], 0.2, False),  # s = 0.7071..., so the bound is 1 + 2.83
        ([0.5, 1.5], [3.9, 3.9], 0.2, True),
        ([-1.0, -1.0], [-0.81, -0.81], 0.2, False),
        ([-1.0, -1.0], [-0.79, -0.79], 0.2, True),
        ([1.0, 1.0], [-9.0, -9.0], 0.2, False),
    ],
)
def test_the_bound_is_the_larger_of_a_share_of_the_start_and_four_deviations(
    start: list[float], later: list[float], tolerance: float, diverges: bool
) -> None:
    assert triggers(Safeguard(2, tolerance), start + later) is diverges


def test_it_judges_whole_windows_against_the_first_one() -> None:
    """One bad step does not count, a slow rise does, and a window in between does not move the start."""
    assert not triggers(Safeguard(4), [1.0] * 4 + [1.0, 1.0, 1.75, 1.0])
    assert not triggers(Safeguard(4), [1.0] * 4 + [1.0, 1.0, 1.0, 1.6, 1.6, 1.0, 1.0, 1.0])
    assert triggers(Safeguard(4), [1.0] * 4 + [1.15] * 4 + [1.3] * 4)
    assert triggers(Safeguard(4), [1.0] * 4 + [0.1] * 4 + [1.3] * 4)
    assert not triggers(Safeguard(4), [1.0] * 4 + [0.1] * 4 + [1.1] * 4)
    with pytest.raises(DivergenceError):
        feed(Safeguard(4), [1.0] * 4 + [5.0] * 4)
    assert feed(Safeguard(4), [1.0] * 4 + [5.0] * 3) == 7


SHAPES: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda r: r.gauss(0, 1),
    "heavy-tailed": lambda r: r.expovariate(1) - 1,
    "two-sided heavy": lambda r: math.copysign(r.expovariate(1), r.random() - 0.5),
    "jumps": lambda r: 10.0 * (r.random() < 0.2) - 2.0,
    "uniform": lambda r: r.uniform(-1.7, 1.7),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    level=st.sampled_from([0.0, 1e-6, 0.7, 2.3, 1e4, -2.0]),
    spread=st.sampled_from([1e-9, 0.05, 0.3, 1.0]),
    gain=st.sampled_from([0.0, 1e-4]),
    seed=st.integers(0, 2**32),
)
def test_a_noisy_but_healthy_run_never_triggers(shape: str, level: float, spread: float, gain: float, seed: int) -> None:
    """Forty windows of independent losses around a level that stays or falls.

    The mean of 50 losses is off by 0.14 deviations, so the bound at 4 of them is 20 standard errors of the difference away.
    """
    draw, scale = random.Random(seed), spread * max(abs(level), 1e-3)
    losses = (level - gain * step * abs(level) + scale * SHAPES[shape](draw) for step in range(40 * 50))
    assert not triggers(Safeguard(), losses)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(level=st.floats(0.01, 100), spread=st.floats(0.0, 0.3), rate=st.floats(0.001, 0.1), seed=st.integers(0, 2**32))
def test_a_run_that_doubles_in_noise_is_stopped(level: float, spread: float, rate: float, seed: int) -> None:
    """A loss that grows by a share of its start a step is caught within two windows after 1 + max(0.2, 4 s) of the start."""
    draw = random.Random(seed)
    losses = [level * (1 + rate * max(0, step - 50) + spread * draw.gauss(0, 1)) for step in range(50 * 60)]
    safeguard, limit = Safeguard(), 150 + math.ceil((max(0.2, 4 * 2 * spread) + spread) / rate)
    with pytest.raises(DivergenceError):
        feed(safeguard, losses[: max(150, limit)])


# ---- what it does


def test_stop_says_what_happened_the_lr_the_usual_range_and_what_to_do() -> None:
    with pytest.raises(DivergenceError) as caught:
        feed(Safeguard(2), [1.0, 1.0, 3.0, 3.0])
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    for part in ("diverges", "last 2 steps is 3", "first 2 1.", "lr=0.5", USUAL, "Lower lr", 'safeguard="halve"', "safeguard=None"):
        assert part in message


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_diverging_run_stops_within_a_few_windows_with_finite_weights(weights: str) -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, 2.0, safeguard=Safeguard(5), weights=weights, estimator=SPSA(2))
    with pytest.raises(DivergenceError, match=rf"lr=2\. Usual is {USUAL}"):
        train(optimizer, mean_square(model, regression()), 30)
    assert optimizer.steps % 5 == 0
    assert 10 <= optimizer.steps <= 20
    assert optimizer.report is not None
    assert optimizer.report.step == optimizer.steps - 1
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_on_by_default_and_compares_windows_of_fifty_steps(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = ZOOptimizer(model, lr=0.05)
    with pytest.raises(DivergenceError, match=r"last 50 steps is 1\.\d+, that of the first 50 0\.3"):
        train(optimizer, mean_square(model, regression(dtype)), 1000)
    assert optimizer.steps == 100


@pytest.mark.filterwarnings("ignore:The objective had the same value")  # on the plateau all differences are 0
@pytest.mark.parametrize("lr", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_run_that_explodes_inside_its_first_window_is_stopped_at_its_end(lr: float, dtype: torch.dtype) -> None:
    """The first loss is the only one that no update has touched."""
    model = mlp(dtype=dtype)
    optimizer = ZOOptimizer(model, lr=lr)
    with pytest.raises(DivergenceError, match=r"last 50 steps is [\d.]+e\+\d+, the first one was 0\.6478"):
        train(optimizer, mean_square(model, regression(dtype)), 1000)
    assert optimizer.steps == 50


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_rare_spikes_are_no_divergence(share: float) -> None:
    """A first window without a spike has no deviation at all."""
    for seed in range(60):
        draw = random.Random(seed)
        assert not triggers(Safeguard(), [0.1 + (draw.random() < share) for _ in range(5000)])


def test_halve_waits_while_the_loss_falls_and_ends_after_ten_times() -> None:
    safeguard = Safeguard(2, action="halve")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZOWarning)
        feed(safeguard, [1.0, 1.0, 9.0, 9.0, 8.0, 8.0, 7.0, 7.0, 6.0, 6.0])
        assert safeguard.scale == 0.5
        feed(safeguard, [6.0] * 18)
        assert safeguard.scale == 2.0**-10
        with pytest.raises(DivergenceError, match="halved 10 times"):
            feed(safeguard, [6.0] * 2)


def test_the_usual_range_is_that_of_what_is_trained() -> None:
    model = nn.ModuleDict({"lora_A": nn.Linear(3, 3, bias=False), "lora_B": nn.Linear(3, 3, bias=False)})
    optimizer = ZOOptimizer(model, lr=0.1, safeguard=Safeguard(2))
    losses = iter([1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    with pytest.raises(DivergenceError, match="Usual is 5e-5 to 1e-4 for LoRA"):
        train(optimizer, lambda: next(losses), 4)


def test_halve_halves_the_step_each_time_and_says_so() -> None:
    """The lr of the groups stays the user's; the factor is the safeguard's own, and a step is as long as its report says."""
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    losses = iter([1.0, 0.9] * 2 + [9.0, 8.9] * 4 + [1.0, 0.9] * 3)
    optimizer = ZOOptimizer(model, lr=0.5, safeguard=Safeguard(2, action="halve"), weight_decay=0.0)
    lrs, said = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(9):
            before = model.weight.detach().clone()
            optimizer.step(lambda: (model(torch.ones(4, dtype=torch.float64)), next(losses))[1])  # type: ignore[arg-type,return-value]
            assert optimizer.report is not None
            length = float((model.weight.detach() - before).abs().max())
            assert length == pytest.approx(optimizer.report.lr * optimizer.report.projected_grad, rel=1e-9)
            lrs.append(optimizer.report.lr)
        said = [str(warning.message) for warning in caught if warning.category is ZOWarning]
    assert lrs == [0.5] * 4 + [0.25] * 2 + [0.125] * 3
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(said) == 2
    assert "lr=0.5. Usual is" in said[0]
    assert "multiplied by 0.5 from now on" in said[0]
    assert "lr=0.25. Usual is" in said[1]
    assert "multiplied by 0.25 from now on" in said[1]


def test_halve_rescues_a_run_that_stop_would_end() -> None:
    """At this lr the loss is above its start after 100 steps (the test above); at a quarter of it the run learns."""
    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.05, safeguard="halve")
    with pytest.warns(ZOWarning, match="The step is halved") as said:
        losses = train(optimizer, mean_square(model, regression()), 400)
    assert optimizer.safeguard is not None
    assert optimizer.safeguard.scale == 0.5 ** len(said) < 1
    assert max(losses) > 3 * losses[0]
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]


def test_warn_says_it_once_and_goes_on_at_full_length() -> None:
    safeguard = Safeguard(2, action="warn")
    with pytest.warns(ZOWarning, match=r"diverges.*lr=0\.5.*Usual is") as said:
        feed(safeguard, [1.0, 1.0] + [3.0, 3.0] * 5)
    assert len(said) == 1
    assert safeguard.scale == 1.0


def test_none_never_interferes() -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.05, safeguard=None)
    losses = train(optimizer, mean_square(model, regression()), 150)
    assert optimizer.safeguard is None
    assert sum(losses[50:100]) > 3 * sum(losses[:50])


def test_skipped_steps_are_not_judged() -> None:
    values = iter([1.0, 1.0, math.nan, math.nan, 1.0, 1.0, math.inf, 1.0, 9.0, 9.0, math.nan, 9.0, 9.0, 9.0])
    optimizer = ZOOptimizer(mlp(), lr=0.1, safeguard=Safeguard(2))
    with pytest.raises(DivergenceError, match=r"first 2 1\. "):
        train(optimizer, lambda: next(values), 8)
    assert (optimizer.steps, optimizer.skipped_steps) == (7, 3)


# ---- its state


@pytest.mark.parametrize("stop", range(0, 12))
def test_a_resumed_run_is_judged_as_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 1.1, 1.2, 2.0, 2.1, 2.2, 3.0, 3.1, 3.2, 4.0, 4.0, 4.0]
    resumed, whole = (ZOOptimizer(mlp(), lr=0.1, safeguard=Safeguard(3, action="halve")) for _ in range(2))
    first = ZOOptimizer(mlp(), lr=0.1, safeguard=Safeguard(3, action="halve"))

    def go(optimizer: ZOOptimizer, part: list[float]) -> list[str]:
        messages.reset()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for loss in part:
                train(optimizer, lambda loss=loss: loss, 1)  # type: ignore[misc]
        return [str(warning.message) for warning in said]

    everything, begun = go(whole, losses), go(first, losses[:stop])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert begun + go(resumed, losses[stop:]) == everything
    assert whole.safeguard is not None
    assert resumed.state_dict()["zo"]["safeguard"] == whole.state_dict()["zo"]["safeguard"]
    assert whole.safeguard.scale == 1 / 8
    state = resumed.state_dict()["zo"]["safeguard"]
    assert json.loads(json.dumps(state)) == state


def test_runs_of_bad_steps_are_counted_across_a_resume() -> None:
    """Two non-finite losses before a checkpoint and one after it are three in a row; so are 19 flat steps and one."""
    nonfinite, flat = (ZOOptimizer(mlp(), lr=0.1, max_nonfinite=3) for _ in range(2))
    train(nonfinite, lambda: math.nan, 2)
    resumed = ZOOptimizer(mlp(), lr=0.1, max_nonfinite=3)
    resumed.load_state_dict(nonfinite.state_dict())
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        train(resumed, lambda: math.nan, 1)
    train(flat, lambda: 1.0, 19)
    resumed.load_state_dict(flat.state_dict())
    with pytest.warns(ZOWarning, match="same value at every point in 20 steps in a row"):
        train(resumed, lambda: 1.0, 1)


def test_optimizers_do_not_share_the_history_of_one_safeguard() -> None:
    shared = Safeguard(2, 0.5)
    first, second = (ZOOptimizer(mlp(), lr=0.1, safeguard=shared) for _ in range(2))
    train(first, lambda: 1.0, 2)
    train(second, lambda: 9.0, 6)
    assert first.safeguard is not None
    assert (first.safeguard.window, first.safeguard.tolerance) == (2, 0.5)
    assert first.safeguard.state_dict()["start"] == [1.0, 0.0]
    assert shared.state_dict() == {"scale": 1.0, "losses": [], "start": None, "halved_at": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, r"Invalid safeguard window: 1\. Must be an integer >= 2"),
        ({"window": 2.0}, r"Invalid safeguard window: 2\.0\. Must be an integer >= 2"),
        ({"tolerance": 0.0}, r"Invalid safeguard tolerance: 0\.0\. Must be a finite number > 0"),
        ({"tolerance": math.nan}, r"Invalid safeguard tolerance: nan\. Must be a finite number > 0"),
        ({"action": "explode"}, r"safeguard='explode' is not known\. Use one of 'stop', 'halve', 'warn', None, or a Safeguard"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Safeguard(**options)  # type: ignore[arg-type]
