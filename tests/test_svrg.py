"""SVRG: against a twin that copies its anchor; where the anchor is; mean and variance; masks, logs, states; what is refused."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, distance, mean_square, mlp, regression, same, snapshot
from reference import svrg as reference
from reference import updates
from reference.spsa import Settings
from reference.updates import Move
from torch import Tensor, nn
from torch.func import functional_call
from trajectory_tools import Recorder

from zo_lightning.engine import SPSA, SVRG, Adam, Momentum, ZOOptimizer
from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import Change, Item, sweep
from zo_lightning.engine.trajectory import Trajectory, read_log, replay, undo, verify
from zo_lightning.engine.updates import GroupSettings

EPS, LR = 1e-2, 2e-2
X, Y = regression(rows=64)
Weights = dict[str, Tensor]


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Another quarter of the rows in every step."""
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:16]
    return X[rows].to(dtype), Y[rows].to(dtype)


def error(step: int, theta: Weights) -> float:
    x, y = batch(step)
    return float((functional_call(mlp(), theta, (x,)) - y).square().mean())


def of(estimator: SVRG, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, ZOOptimizer]:
    model = mlp() if model is None else model
    return model, ZOOptimizer(model, **{"lr": LR, "eps": EPS, "estimator": estimator, **options})


def steps(model: nn.Module, optimizer: ZOOptimizer, count: int, first: int = 0, pieces: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + count):
        x, y = batch(step, dtype)
        for rows in torch.arange(len(x)).chunk(pieces):
            optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
        optimizer.apply()


def of_anchor(optimizer: ZOOptimizer) -> int:
    """How many steps were made with the anchor at hand; 0 behind the last one."""
    return int(optimizer.progress.estimator.state_dict().get("steps", 0))


def ended(model: nn.Module, optimizer: ZOOptimizer) -> Weights:
    with optimizer.settled():
        return snapshot(model)


# ---- the steps


METHODS: dict[str, SVRG] = {
    "defaults": SVRG(),
    "queries": SVRG(2, refresh=7, anchor=3),
    "MeZO-SVRG": SVRG(1, refresh=2, anchor=1),
    "never between": SVRG(2, refresh=4, anchor=4),
}


def twin(estimator: SVRG, count: int = 100, move: Move | None = None, copied: bool = True, **given: Any) -> Weights:
    theta = snapshot(mlp())
    settings = Settings(LR, eps=EPS, queries=estimator.queries, **given)
    how = reference.Anchor(estimator.refresh, estimator.anchor, copied)
    with torch.no_grad():
        reference.run(theta, error, settings, how, count, move)
    return theta


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_a_twin_that_copies_its_anchor(method: str, weights: Any) -> None:
    """100 steps. A twin whose anchor is the weights themselves, the bug of released code, goes elsewhere."""
    model, optimizer = of(METHODS[method], weights=weights)
    steps(model, optimizer, 100)
    got = ended(model, optimizer)
    assert distance(got, twin(METHODS[method])) < 1e-11
    if METHODS[method].refresh > METHODS[method].anchor:
        assert distance(got, twin(METHODS[method], copied=False)) > 1e-3


def test_gaussian_noise() -> None:
    model, optimizer = of(SVRG(2, refresh=6, anchor=2), noise="gaussian")
    steps(model, optimizer, 30)
    assert distance(snapshot(model), twin(SVRG(2, refresh=6, anchor=2), 30, noise="gaussian")) < 1e-6


def test_momentum_sums_estimates_and_not_what_only_measures() -> None:
    estimator = SVRG(2, refresh=6, anchor=3)
    model, optimizer = of(estimator, update=Momentum(0.8, window=5))
    steps(model, optimizer, 40)
    assert distance(snapshot(model), twin(estimator, 40, updates.window(0.8, 5))) < 1e-11


def test_without_steps_between_it_is_spsa_bit_for_bit() -> None:
    ends = []
    for estimator in (SVRG(2, refresh=1, anchor=1), SPSA(4)):
        model = mlp()
        steps(model, ZOOptimizer(model, lr=LR, eps=EPS, estimator=estimator), 10)
        ends.append(snapshot(model))
    assert same(*ends)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_micro_batches_are_one_batch(weights: str) -> None:
    ends = []
    for pieces in (1, 4):
        model, optimizer = of(SVRG(2, refresh=5, anchor=2), weights=weights)
        steps(model, optimizer, 12, pieces=pieces)
        ends.append(snapshot(model))
    assert distance(*ends) < 1e-11


def test_batches_that_make_up_the_data_measure_what_the_whole_of_it_would() -> None:
    model, optimizer = of(SVRG(2, refresh=5, anchor=4))
    for rows in torch.arange(64).chunk(4):
        optimizer.step(mean_square(model, (X[rows], Y[rows])))
    whole = mlp()
    second = ZOOptimizer(whole, lr=LR, eps=EPS, estimator=SPSA(4))
    second.step(mean_square(whole, (X, Y)))
    assert distance(snapshot(model), snapshot(whole)) < 1e-12
    assert not same(snapshot(model), snapshot(mlp()))


def test_steps_that_measure_say_so_and_move_nothing() -> None:
    model, optimizer = of(SVRG(2, refresh=5, anchor=3))
    before, points, rates, moved = snapshot(model), [], [], []
    for step in range(10):
        steps(model, optimizer, 1, first=step)
        report = optimizer.report
        assert report is not None
        points.append(len(report.values))
        rates.append(report.lr)
        moved.append(not same(snapshot(model), before))
        before = snapshot(model)
        assert not report.zero_difference
        assert report.projected_grad != 0
    assert points == 10 * [8]
    assert rates == 2 * [0.0, 0.0, LR, LR, LR]
    assert moved == 2 * [False, False, True, True, True]
    assert optimizer.forward_passes == sum(points)


def test_a_step_without_a_finite_value_does_not_count() -> None:
    model, optimizer = of(SVRG(1, refresh=4, anchor=2))
    spoilt = {1, 4}
    for step in range(8):
        data = batch(step)
        optimizer.step(lambda step=step, data=data: mean_square(model, data)() * (math.nan if step in spoilt else 1.0))
    assert optimizer.skipped_steps == 2
    assert of_anchor(optimizer) == 2
    state = optimizer.progress.estimator.state_dict()
    assert {seed for seed, *_ in state["mean"]} <= {seed for seed, *_ in state["back"]}


# ---- where the anchor is


@contextmanager
def anchors(optimizer: ZOOptimizer, model: nn.Module) -> Iterator[list[Weights]]:
    """The weights that evaluations at theta~ see, without their own perturbation: from the displacements of every step."""
    found: list[Weights] = []
    evaluate = optimizer._evaluator.evaluate

    def spied(task: Any) -> Any:
        if any(len(point) > 1 for point in task.points):
            found.append(displaced(optimizer, max(task.points, key=len)[1:]))
        return evaluate(task)

    optimizer._evaluator.evaluate = spied  # type: ignore[method-assign]
    yield found


def displaced(optimizer: ZOOptimizer, point: Displacement) -> Weights:
    """What a residency would write for a point."""
    found = {}
    for p in optimizer.residency.trained:
        out = torch.empty_like(p.tensor)
        eps = optimizer.param_groups[p.group]["eps"]
        item = Item(out, p.tensor.detach(), p.key, 1.0, tuple(multiple * eps for _, multiple in point))
        sweep([item], [seed for seed, _ in point], optimizer.noise, rounding=1)
        found[p.name] = out
    return found


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_the_anchor_stays_while_the_weights_move(dtype: torch.dtype, near: float) -> None:
    """The bug of released code: an anchor that is copied by reference is where the weights are."""
    model, optimizer = of(SVRG(2, refresh=30, anchor=2), mlp(dtype=dtype))
    begin = {name: w.detach().clone() for name, w in model.named_parameters()}
    with anchors(optimizer, model) as found:
        steps(model, optimizer, 30)
    assert len(found) == 28
    assert distance(found[-1], begin) < near
    assert distance(snapshot(model), begin) > 0.2


def test_in_16_bits_the_anchor_moves_by_the_rounding_of_the_steps_alone() -> None:
    """Matrices of bfloat16 are rounded in every step, which nobody can take back: about the root of the number of steps in their units."""
    model, optimizer = of(SVRG(2, refresh=30, anchor=2), mlp(dtype=torch.bfloat16), lr=1e-3)
    begin = {name: w.detach().clone() for name, w in model.named_parameters()}
    with anchors(optimizer, model) as found:
        steps(model, optimizer, 30)
    unit = {name: 2.0 ** (torch.frexp(w.float().abs()).exponent - 8) for name, w in begin.items()}
    far = torch.cat([((found[-1][name].float() - w.float()) / unit[name]).flatten() for name, w in begin.items()])
    moved = torch.cat([((w.detach().float() - begin[name].float()) / unit[name]).flatten() for name, w in model.named_parameters()])
    assert float(far.square().mean().sqrt()) < 0.5 * math.sqrt(30) < float(moved.square().mean().sqrt()) / 10
    assert abs(float(far.mean())) < 4 * float(far.std()) / math.sqrt(len(far))


def test_lr_may_change_between_steps() -> None:
    model, optimizer = of(SVRG(1, refresh=12, anchor=2))
    begin = snapshot(model)
    with anchors(optimizer, model) as found:
        for step in range(12):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / 12)
            steps(model, optimizer, 1, first=step)
    assert distance(found[-1], begin) < 1e-15
    assert distance(snapshot(model), begin) > 0.01


def test_a_first_step_without_a_learning_rate_leaves_the_weights_at_the_anchor() -> None:
    """Warmup begins with lr 0."""
    model, optimizer = of(SVRG(1, refresh=4, anchor=1), lr=0.0)
    steps(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = LR
    steps(model, optimizer, 1, first=1)
    assert optimizer.report is not None
    assert optimizer.report.values[:2] == optimizer.report.values[2:]


# ---- what an estimate is on average, and how it varies


def gradient(theta: Weights) -> Weights:
    """On all rows, by backpropagation."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in theta.items()}
    loss = (functional_call(mlp(), leaves, (X,)) - Y).square().mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_the_mean_is_the_gradient_within_four_standard_errors() -> None:
    """At the weights of each draw, which have moved along its own mu."""
    off = []
    for draw in range(400):
        model, optimizer = of(SVRG(2, refresh=3, anchor=2), eps=1e-4, seed=draw, lr=1e-2)
        steps(model, optimizer, 2, first=3 * draw)
        optimizer.estimate(mean_square(model, batch(3 * draw + 2)))
        window = optimizer._window
        assert window is not None
        assert window.totals is not None
        terms = optimizer.progress.terms(window.points, [float(total) for total in window.totals])
        theta = {name: w.detach() for name, w in model.named_parameters()}
        expected = gradient(theta)
        found = {name: torch.zeros_like(w) for name, w in theta.items()}
        for p in optimizer.residency.trained:
            slopes = tuple(term.slope / optimizer.eps for term in terms)
            item = Item(found[p.name], found[p.name], p.key, 1.0, slopes)
            sweep([item], [term.seed for term in terms], optimizer.noise)
        off.append(torch.cat([(found[name] - expected[name]).flatten() for name in theta]))
    every = torch.stack(off)
    assert len(every[0]) == 177
    assert bool((every.mean(0).abs() < 4 * every.std(0) / math.sqrt(len(every))).all())


def quadratics(count: int = 8, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """L_b(x) = (x - c_b)' H_b (x - c_b) / 2 for batches b: H (count, d, d) and c (count, d)."""
    random = np.random.default_rng(1)
    half = random.normal(size=(count, d, d))
    return half @ half.transpose(0, 2, 1) / d, random.normal(size=(count, d))


@pytest.mark.parametrize("away", [0.1, 3.0])
def test_the_variance_on_a_sum_of_quadratics_is_that_of_theory(away: float) -> None:
    """SPSA(m) with signs z has the variance V(grad L_B(x), m), V(v_B, m) = (d - 1) / m E |v_B|^2 + E |v_B|^2 - |E v_B|^2, and SVRG(n)

        V(grad L_B(x) - grad L_B(x~), n) + V(mean of grad L_B(x~) over A batches, 2n).

    Near an anchor in the minimum that is less than a third of SPSA's with as many evaluations, m = 2n; far from it, more.
    """
    hessians, centres = quadratics()
    d, count, eps, draws = centres.shape[1], len(centres), 1e-2, 8000
    random = np.random.default_rng(0)
    estimator, settings = SVRG(1, refresh=5, anchor=4), [GroupSettings(1.0, eps, 0.0)]
    anchor = np.linalg.solve(hessians.mean(0), np.einsum("bij,bj->i", hessians, centres) / count)
    direction = random.choice([-1.0, 1.0], size=d)
    x = anchor + away * direction
    found = []
    for _ in range(draws):
        state, noises = estimator.begin(), {99: direction}
        for step in range(estimator.anchor + 1):
            noises |= {2 * step + query: random.choice([-1.0, 1.0], size=d) for query in range(2)}
            b, here = random.integers(count), anchor if step < estimator.anchor else x
            points = state.points(lambda query, step=step: 2 * step + query)
            values = []
            for point in points:
                at = here + sum(multiple * eps * noises[seed] for seed, multiple in point) - centres[b]
                values.append(float(at @ hessians[b] @ at / 2))
            terms = state.terms(points, values)
            state.remember(terms, Change((99,), ((1.0, (away if step == estimator.anchor - 1 else 0.0,)),), None), settings)
        found.append(sum(term.slope / eps * noises[term.seed] for term in terms))

    def spread(each: np.ndarray, directions: int, averaged: int = 1) -> float:
        """V, of vectors of which A are averaged before."""
        mean = float((each.mean(0) ** 2).sum())
        varying = float((each**2).sum(1).mean() - mean) / averaged
        return (d - 1) / directions * (mean + varying) + varying

    at_x, at_anchor = (np.einsum("bij,bj->bi", hessians, where - centres) for where in (x, anchor))
    expected = spread(at_x - at_anchor, 1) + spread(at_anchor, 2, estimator.anchor)
    got = np.array(found)
    assert got.var(0).sum() == pytest.approx(expected, rel=0.06)
    assert (expected < spread(at_x, 2) / 3) == (away < 1)
    assert (np.abs(got.mean(0) - at_x.mean(0)) < 4 * got.std(0, ddof=1) / math.sqrt(draws)).all()


def test_with_all_of_the_data_in_an_anchor_it_converges_where_spsa_stays_at_the_noise_of_batches() -> None:
    """Least squares of 5 weights, 4 batches of 4 rows, as many evaluations."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, generator=draw, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=draw, dtype=torch.float64)
    least = float((x @ torch.linalg.lstsq(x, y).solution - y).square().mean())
    above = {}
    for estimator, lr in ((SVRG(1, refresh=8, anchor=4), 3e-2), (SPSA(2), 3e-2), (SPSA(2), 1e-2), (SPSA(2), 3e-3)):
        torch.manual_seed(1)
        model = nn.Linear(5, 1, bias=False).double()
        optimizer = ZOOptimizer(model, lr=lr, eps=1e-3, estimator=estimator, safeguard=None)
        for step in range(600):
            rows = slice(step % 4 * 4, step % 4 * 4 + 4)
            optimizer.step(mean_square(model, (x[rows], y[rows])))
        with torch.no_grad():
            above[estimator.name, lr] = float((model(x) - y).square().mean()) - least
    best = min(far for (name, _), far in above.items() if name == "spsa")
    assert above["svrg", 3e-2] < 1e-5
    assert best > 1e-3


# ---- masks, other tensors


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("rule", ["random", "half_layers"])
def test_what_a_mask_leaves_out_stays_and_the_anchor_too(rule: str, weights: Any) -> None:
    model, optimizer = of(SVRG(2, refresh=8, anchor=2), mask=Mask(rule, 0.05 if rule == "random" else None), weights=weights)
    before = snapshot(model)
    steps(model, optimizer, 2)
    if (chosen := optimizer.masks.chosen) is None:
        raise AssertionError
    masks = {p.name: optimizer.masks.of(p.key) for p in optimizer.residency.trained}
    keep = {
        p.name: torch.full(p.shape, p.key in chosen) if (mask := masks[p.name]) is None
        else mask.at(torch.arange(p.tensor.numel()), p.tensor.detach().reshape(-1)).view(p.shape)
        for p in optimizer.residency.trained
    }  # fmt: skip
    steps(model, optimizer, 10, first=2)
    got = ended(model, optimizer)
    theta = {name: w.clone() for name, w in before.items()}
    settings = Settings(LR, eps=EPS, queries=2, mask=lambda step, theta: {name: keep[name].double() for name in theta})
    reference.run(theta, error, settings, reference.Anchor(8, 2), 12)
    assert distance(got, theta) < 1e-11
    assert all(torch.equal(got[name][~keep[name]], before[name][~keep[name]]) for name in got)


def test_a_mask_that_is_made_anew_begins_with_another_anchor() -> None:
    model, optimizer = of(SVRG(1, refresh=100, anchor=2), mask=Mask("random", 0.3, refresh=5))
    made = []
    for step in range(10):
        steps(model, optimizer, 1, first=step)
        made.append(of_anchor(optimizer))
    assert made == 2 * [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["frozen", "another group"])
def test_other_tensors_begin_with_another_anchor(change: str) -> None:
    model = mlp()
    named = dict(model.named_parameters())
    given = [("0.weight", named["0.weight"]), ("3.weight", named["3.weight"])]
    optimizer = ZOOptimizer([{"params": given}], lr=LR, eps=EPS, estimator=SVRG(1, refresh=100, anchor=2))
    steps(model, optimizer, 4)
    assert of_anchor(optimizer) == 4
    if change == "frozen":
        named["3.weight"].requires_grad_(False)
    else:
        optimizer.add_param_group({"params": [("3.bias", named["3.bias"])]})
    steps(model, optimizer, 1, first=4)
    assert of_anchor(optimizer) == 1


def test_other_tensors_within_a_step_are_refused() -> None:
    model, optimizer = of(SVRG(1, refresh=100, anchor=1))
    steps(model, optimizer, 2)
    optimizer.estimate(mean_square(model, batch(2)))
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"given up while a step was measured.*Do that between two steps"):
        steps(model, optimizer, 1, first=2)
    before = snapshot(model)
    steps(model, optimizer, 1, first=2)
    assert not same(snapshot(model), before)


# ---- logs and states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("update", ["sgd", Momentum(0.8, window=3)], ids=str)
def test_the_step_log_is_replayed_bit_for_bit(update: Any, weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    estimator = SVRG(2, refresh=5, anchor=2)
    model, optimizer = of(estimator, mlp(dtype=dtype), weights=weights, update=update, safeguard=None)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for step in range(13):
        x, y = batch(step, dtype)
        spoilt = math.nan if step in (3, 6) else 1.0
        optimizer.step(lambda x=x, y=y, spoilt=spoilt: (model(x) - y).float().square().mean() * spoilt)
    recorder.writer.close()
    log = tmp_path / "run.zolog"
    assert len(read_log(log).steps) == 13
    again = mlp(dtype=dtype)
    assert replay(again, log) == 13
    assert same(snapshot(again), snapshot(model))
    assert verify(mlp(dtype=dtype), log).ok
    assert undo(again, log, 8) == 8
    half = mlp(dtype=dtype)
    replay(half, log, 8)
    assert same(snapshot(again), snapshot(half))


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_within_an_epoch_and_a_window_goes_on_bit_for_bit(dtype: torch.dtype, weights: Any) -> None:
    """Through a file that torch.load reads with weights_only; behind steps that measure and steps that move, and between micro-batches."""
    for done in (1, 4):
        model, optimizer = of(SVRG(2, refresh=6, anchor=2), mlp(dtype=dtype), weights=weights)
        steps(model, optimizer, done, pieces=2)
        x, y = batch(done, dtype)
        halves = [mean_square(model, (x[rows], y[rows])) for rows in torch.arange(16).chunk(2)]
        optimizer.estimate(halves[0], weight=0.5)
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), ended(model, optimizer)], file)
        file.seek(0)
        state, values = torch.load(file, weights_only=True)
        again = mlp(dtype=dtype, seed=3)
        again.load_state_dict(values)
        _, second = of(SVRG(2, refresh=6, anchor=2), again, weights=weights)
        second.load_state_dict(state)
        pairs = [(model, optimizer), (again, second)]
        if weights is not STREAMED:
            pairs.append(copy.deepcopy((model, optimizer)))
        for own, one in pairs:
            one.estimate(mean_square(own, (x[8:], y[8:])), weight=0.5)
            one.apply()
            steps(own, one, 8, first=done + 1, pieces=2)
        ends = [ended(own, one) for own, one in pairs]
        assert all(same(end, ends[0]) for end in ends)


def test_a_state_of_another_anchor_is_refused_and_one_between_two_is_not() -> None:
    for done, goes_on in ((3, False), (4, True)):
        model, optimizer = of(SVRG(1, refresh=4, anchor=2))
        steps(model, optimizer, done)
        other = of(SVRG(1, refresh=5, anchor=2))[1]
        if goes_on:
            other.load_state_dict(optimizer.state_dict())
            assert other.steps == 4
            continue
        with pytest.raises(ValueError, match=r"estimator=SVRG\(.*refresh=5.* saved between two steps that SVRG\(.*refresh=4"):
            other.load_state_dict(optimizer.state_dict())
        assert other.steps == 0
        of(SPSA())[1].load_state_dict(optimizer.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("killed", [3, 7, 9])
@pytest.mark.filterwarnings("ignore:The run in:zo_lightning.engine.messages.ZOWarning")
def test_a_run_that_was_killed_goes_on_bit_for_bit(killed: int, weights: str, tmp_path: Path) -> None:
    """From the base of its log, by recalled steps; and from a checkpoint in the midst of an anchor's steps."""

    def begun(folder: Path) -> tuple[nn.Module, ZOOptimizer, Trajectory]:
        model, optimizer = of(SVRG(1, refresh=4, anchor=2), weights=weights)
        log = Trajectory(folder)
        log.begin(optimizer)
        return model, optimizer, log

    model, optimizer, log = begun(tmp_path / "whole")
    steps(model, optimizer, 12)
    log.close(optimizer)
    cut, one, log = begun(tmp_path / "cut")
    steps(cut, one, 2)
    log.mark(one)
    saved = copy.deepcopy((one.state_dict(), snapshot(cut)))
    steps(cut, one, killed - 2, first=2)
    log.close(one)
    rest, two, log = begun(tmp_path / "cut")
    assert log.behind == killed
    steps(rest, two, 12)
    assert same(snapshot(rest), snapshot(model))
    log.close(two)
    last, three = of(SVRG(1, refresh=4, anchor=2), weights=weights)
    last.load_state_dict(saved[1])
    three.load_state_dict(saved[0])
    log = Trajectory(tmp_path / "cut")
    log.begin(three)
    assert log.behind == 10
    steps(last, three, 10, first=2)
    assert same(snapshot(last), snapshot(model))
    log.close(three)


@pytest.mark.filterwarnings("ignore:Before step 3:zo_lightning.engine.messages.ZOWarning")
def test_weights_that_were_changed_by_others_begin_with_another_anchor_in_a_log(tmp_path: Path) -> None:
    model, optimizer = of(SVRG(1, refresh=10, anchor=1))
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    made = []
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        steps(model, optimizer, 1, first=step)
        made.append(of_anchor(optimizer))
    log.end(optimizer)
    log.close(optimizer)
    assert made == [1, 2, 3, 1, 2, 3]
    again = mlp()
    assert replay(again, log.path) == 6
    assert same(snapshot(again), snapshot(model))
    with pytest.raises(ValueError, match="in none of the states"):
        replay(mlp(seed=5), log.path)


@pytest.mark.filterwarnings("ignore:Before step:zo_lightning.engine.messages.ZOWarning")
def test_weights_that_were_changed_within_a_step_are_refused_in_a_log_and_it_goes_on(tmp_path: Path) -> None:
    model, optimizer = of(SVRG(1, refresh=10, anchor=1), weights="copy")
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    steps(model, optimizer, 2)
    optimizer.estimate(mean_square(model, batch(2)), weight=0.5)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"weights were changed by something else, since its first micro-batch.*not made"):
        steps(model, optimizer, 1, first=3)
    assert same(snapshot(model), before)
    steps(model, optimizer, 3, first=3)
    log.end(optimizer)
    log.close(optimizer)
    again = mlp()
    assert replay(again, log.path) == 5
    assert same(snapshot(again), snapshot(model))


def test_weights_within_an_anchors_steps_are_no_state_to_replay_from(tmp_path: Path) -> None:
    model, optimizer = of(SVRG(1, refresh=8, anchor=2))
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    steps(model, optimizer, 4)
    log.mark(optimizer)
    half = copy.deepcopy(model)
    steps(model, optimizer, 4, first=4)
    log.close(optimizer)
    with pytest.raises(ValueError, match="in none of the states"):
        replay(half, log.path)


# ---- options


def grouped(**second: float) -> ZOOptimizer:
    model = mlp()
    names = dict(model.named_parameters())
    given = [{"params": [("0.weight", names["0.weight"])]}, {"params": [("3.weight", names["3.weight"])], **second}]
    optimizer = ZOOptimizer(given, lr=LR, eps=EPS, estimator=SVRG(1, refresh=4, anchor=1), module=model)
    steps(model, optimizer, 3)
    return optimizer


def with_another_eps() -> None:
    model, optimizer = of(SVRG(1, refresh=4, anchor=1))
    steps(model, optimizer, 2)
    optimizer.param_groups[0]["eps"] = 2 * EPS
    before = snapshot(model)
    try:
        steps(model, optimizer, 1)
    finally:
        assert same(snapshot(model), before)
        optimizer.forget()
        steps(model, optimizer, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SVRG(0), r"Invalid queries: 0\. Must be an integer >= 1"),
        (lambda: SVRG(anchor=0), r"Invalid anchor: 0\. Must be an integer >= 1 \(the steps that measure"),
        (lambda: SVRG(refresh=3, anchor=4), r"Invalid refresh: 3\. Must be an integer >= 4 \(.*of which anchor=4 measure it"),
        (lambda: SVRG(refresh=2.5), r"Invalid refresh: 2.5"),  # type: ignore[arg-type]
        (lambda: of(SVRG(), clip=1.0), r"Invalid clip: 1.0 with estimator=SVRG.*only together.*Leave clip out"),
        (lambda: of(SVRG(), update="adam"), r"Invalid update: 'adam' with estimator=SVRG.*sums of perturbations.*\"sgd\" or \"momentum\""),
        (lambda: of(SVRG(), update=Adam()), r"Invalid update: Adam.* with estimator=SVRG"),
        (lambda: of(SVRG(), weight_decay=0.1), r"Invalid weight_decay: 0.1 with estimator=SVRG.*Use weight_decay=0"),
        (lambda: grouped(weight_decay=0.2), r"Invalid weight_decay: 0.2 with estimator=SVRG"),
        (lambda: grouped(lr=2 * LR), r"moved by one multiple.*lr / eps\*\*2; it is 200, 400 here"),
        (with_another_eps, r"eps of the groups was \[0.01\] where SVRG.*is \[0.02\] now.*forget\(\)"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_groups_of_one_ratio_are_moved_and_found_together() -> None:
    optimizer = grouped(lr=4 * LR, eps=2 * EPS)
    begin, now = snapshot(mlp()), displaced(optimizer, tuple(optimizer.progress.estimator.state_dict()["back"]))
    assert all(torch.allclose(now[name], begin[name], atol=1e-15) for name in now)
    assert len(now) == 2


def test_by_name() -> None:
    assert of("svrg")[1].estimator == SVRG()  # type: ignore[arg-type]
