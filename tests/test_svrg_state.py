"""SVRG: masks and other tensors, step logs, states, what is refused."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, distance, mean_square, mlp, same, snapshot
from reference import svrg as reference
from reference.spsa import Settings
from svrg_tools import EPS, LR, batch, displaced, ended, error, of, of_anchor, steps
from torch import nn
from trajectory_tools import Recorder

from zo_lightning.engine import SPSA, SVRG, Adam, Momentum, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.trajectory import Trajectory, read_log, replay, undo, verify

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


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_weights_that_were_changed_by_others_begin_with_another_anchor_without_a_log_too(weights: str) -> None:
    """The best weights of a run are loaded in the middle of an epoch: nothing pulls them back to where the anchor was."""
    model, optimizer = of(SVRG(1, refresh=10, anchor=1), weights=weights)
    made = []
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        steps(model, optimizer, 1, first=step)
        made.append(of_anchor(optimizer))
    assert made == [1, 2, 3, 1, 2, 3]


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
    optimizer.load_state_dict(optimizer.state_dict())  # which knows it, too
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
