"""The line search of ZO-RankSGD: against a naive reference, with oracles, micro-batches, groups, copies and hosts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, mlp, regression, same, snapshot
from ranking_worker import run, smallest_first
from reference.spsa import Settings, noise_like
from torch import Tensor, nn
from torch.func import functional_call
from trajectory_tools import Recorder

from zo_lightning.engine import RankSGD, ZOOptimizer
from zo_lightning.engine.line_search import as_now
from zo_lightning.engine.objectives import FileOracle, Ranking
from zo_lightning.engine.trajectory import StepRecord, read_log, replay

EPS, LR, STEPS = 0.1, 0.01, 6
ALONG = [1.0, 0.5, 0.25, 0.0]


def error(model: Any, theta: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    return float((functional_call(model, theta, (x,)) - y).square().mean())


def naive(noise: str = "rademacher", decay: float = 0.0) -> tuple[dict[str, Tensor], list[float]]:
    """z as whole tensors, a sum over edges, every length tried; and the lengths that were best."""
    model, (x, y) = mlp(), regression()
    theta, lengths = dict(snapshot(model)), []
    for step in range(STEPS):
        z = [noise_like(theta, Settings(LR, eps=EPS, noise=noise), step, i) for i in range(4)]
        order = sorted(range(4), key=lambda i: error(model, {name: w + EPS * z[i][name] for name, w in theta.items()}, x, y))
        pairs = [(order[a], order[b]) for a in range(4) for b in range(a + 1, 4)]
        zero = {name: torch.zeros_like(w) for name, w in theta.items()}
        found = {name: sum((z[worse][name] - z[better][name] for better, worse in pairs), zero[name]) / 6 for name in theta}
        tried = [{name: w - a * LR / EPS * found[name] for name, w in theta.items()} for a in ALONG]
        errors = [error(model, weights, x, y) for weights in tried]
        length = ALONG[errors.index(min(errors))]
        lengths.append(length)
        theta = {name: (1 - LR * decay) * w - length * LR / EPS * found[name] for name, w in theta.items()}
    return theta, lengths


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("asked", [True, False], ids=["an oracle", "losses"])
def test_steps_are_those_of_the_naive_reference(asked: bool, noise: str, weights: Any) -> None:
    model, (x, y) = mlp(), regression()
    searching = []

    def oracle(outputs: list[Tensor]) -> list[int]:
        errors = [float((output - y).square().mean()) for output in outputs]
        searching.append(len(outputs) == len(ALONG) and len(searching) % 2 == 1)
        order = sorted(range(len(outputs)), key=lambda i: errors[i])
        return order[:1] if searching[-1] else order

    options = {"noise": noise, "weights": weights, "weight_decay": 0.01, "estimator": RankSGD(4, search=3)}
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, objective=Ranking(oracle) if asked else None, **options)
    for _ in range(STEPS):
        optimizer.step(lambda: {"outputs": model(x)} if asked else (model(x) - y).square().mean())
        assert optimizer.report is not None
        assert len(optimizer.report.values) == 4
    assert optimizer.forward_passes == STEPS * 8
    assert sum(searching) == (STEPS if asked else 0)
    expected, lengths = naive(noise, 0.01)
    assert len(set(lengths)) > 1
    with optimizer.settled():
        far = max(float((p - expected[name]).abs().max()) for name, p in model.state_dict().items())
    assert far < (1e-12 if noise == "rademacher" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_step_log_of_searches_is_replayed(weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x, y) = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=RankSGD(4, search=3))
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(STEPS):
        optimizer.step(lambda: (model(x) - y).float().square().mean())
    recorder.writer.close()
    steps = [record for record in read_log(tmp_path / "run.zolog").records if isinstance(record, StepRecord)]
    assert len({record.values[4:].index(min(record.values[4:])) for record in steps}) > 1
    again = mlp(dtype=dtype)
    assert replay(again, tmp_path / "run.zolog") == STEPS
    assert same(snapshot(again), snapshot(model))


def test_micro_batches_are_searched_together() -> None:
    model, (x, y) = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, search=3))
    for _ in range(STEPS):
        for rows in torch.arange(len(x)).chunk(3):
            loss = lambda rows=rows: (model(x[rows]) - y[rows]).square().mean()  # noqa: E731
            optimizer.estimate(loss, weight=len(rows) / len(x))
        optimizer.apply()
    expected, _ = naive()
    assert all(float((p - expected[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())


def test_closures_of_a_loop_are_searched_with_the_rows_that_they_had() -> None:
    """All of them name the loop's variables, which have the last micro-batch when the search begins."""
    model, (x, y) = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, search=3))

    def run() -> None:
        for _ in range(STEPS):
            for rows in torch.arange(len(x)).chunk(3):

                def answers() -> Any:
                    return model(x[rows])  # noqa: B023

                optimizer.estimate(lambda: (answers() - y[rows]).square().mean(), weight=len(rows) / len(x))  # noqa: B023
            optimizer.apply()

    run()
    expected, _ = naive()
    assert all(float((p - expected[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())


def test_closures_of_a_script_are_searched_with_the_rows_that_they_had() -> None:
    """At the top of a file the loop's variables are global ones."""
    model, (x, y) = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, search=3))
    script = """
for _ in range(steps):
    for rows in torch.arange(len(x)).chunk(3):
        optimizer.estimate(lambda: (model(x[rows]) - y[rows]).square().mean(), weight=len(rows) / len(x))
    optimizer.apply()
"""
    exec(script, {"steps": STEPS, "torch": torch, "model": model, "optimizer": optimizer, "x": x, "y": y})
    expected, _ = naive()
    assert all(float((p - expected[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())


def test_a_closure_keeps_its_own_ways() -> None:
    """Defaults, attributes, itself, and variables that nothing was assigned to yet."""

    def closure(*parts: int, least: int = 3) -> Any:
        if not parts:
            return closure(1, 2, least=least) + closure.more  # type: ignore[attr-defined]
        return sum(parts) + least if len(parts) == 2 else later

    closure.more = 10  # type: ignore[attr-defined]
    again = as_now(closure)
    assert again() == closure() == 16
    later = 5
    assert closure(1) == later
    assert as_now(dict) is dict


def test_nobody_notices_the_search() -> None:
    """Buffers, generators, and what the closure's `muted` hides."""
    ends = []
    for search in (0, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
        optimizer = ZOOptimizer(model, lr=1e-9, eps=1e-3, estimator=RankSGD(3, search=search))
        for _ in range(2):
            optimizer.step(lambda model=model: model(regression()[0]).square().mean())
        ends.append((dict(model.named_buffers()), torch.rand(())))
    assert ends[0][1] == ends[1][1]
    for name, buffer in ends[0][0].items():
        assert torch.allclose(buffer.double(), ends[1][0][name].double(), atol=1e-4), name
    assert int(ends[0][0]["1.num_batches_tracked"]) == int(ends[1][0]["1.num_batches_tracked"]) == 2


def test_a_value_that_is_not_finite_is_the_worst() -> None:
    model, (x, y) = mlp(), regression()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, search=2))
    calls = 0

    def loss(bad: range) -> Tensor:
        nonlocal calls
        calls += 1
        return (model(x) - y).square().mean() * (math.nan if calls - 1 in bad else 1.0)

    optimizer.step(lambda: loss(range(4, 7)))
    assert same(before, snapshot(model))  # not one length was good
    assert optimizer.skipped_steps == 0
    calls = 0
    optimizer.step(lambda: loss(range(1, 2)))
    assert calls == 4
    assert optimizer.skipped_steps == 1
    calls = 0
    optimizer.step(lambda: loss(range(4, 6)))
    assert same(before, snapshot(model))  # the only good one stays
    assert optimizer.zero_difference_steps == 0


def test_no_learning_rate_needs_no_search() -> None:
    model, (x, y) = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=0.0, eps=EPS, estimator=RankSGD(4, search=2))
    optimizer.step(lambda: (model(x) - y).square().mean())
    assert optimizer.forward_passes == 4


def test_groups_move_together_or_not_at_all() -> None:
    model, (x, y) = mlp(), regression()
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": LR, "eps": EPS}, {"params": rest, "lr": 4 * LR, "eps": 2 * EPS}]
    optimizer = ZOOptimizer(groups, estimator=RankSGD(4, search=2))
    optimizer.step(lambda: (model(x) - y).square().mean())
    before = snapshot(model)
    groups[1]["eps"] = EPS
    optimizer = ZOOptimizer(groups, estimator=RankSGD(4, search=2))
    with pytest.raises(ValueError, match=r"group 1 has another than the first \(1, 4\).*tries none"):
        optimizer.step(lambda: (model(x) - y).square().mean())
    assert same(before, snapshot(model))


@pytest.mark.parametrize(("option", "value"), [("search", -1), ("search", 1.5), ("shrink", 0.0), ("shrink", 1), ("shrink", "half")])
def test_bad_options(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Invalid {option}"):
        RankSGD(**{option: value})


def test_a_shrink_without_a_search_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shrink=0\.3 does nothing without a line search\. Give search= as well"):
        RankSGD(3, shrink=0.3)
    assert RankSGD(3, search=1, shrink=0.3).along == (1.0, 0.0)


def test_what_was_measured_before_a_checkpoint_or_by_a_copy_is_gone() -> None:
    model, (x, y) = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, search=2))
    optimizer.estimate(lambda: (model(x) - y).square().mean())
    state = optimizer.state_dict()
    other = ZOOptimizer(mlp(), lr=LR, eps=EPS, estimator=RankSGD(4, search=2))
    other.load_state_dict(state)
    copied, own = copy.deepcopy((optimizer, model))
    before = snapshot(own)
    for lost in (other, copied):
        with pytest.raises(RuntimeError, match="saved between two steps"):
            lost.apply()
    assert same(before, snapshot(own))
    assert optimizer.apply() is not None


def test_files_have_a_question_of_their_own(tmp_path: Path) -> None:
    oracle = FileOracle(tmp_path, timeout=0.01, poll=0.01)
    with pytest.raises(TimeoutError, match=r"question-3-search\.json"):
        oracle.ask(3, [1.0, 2.0], 1, True)
    identity = json.loads((tmp_path / "question-3-search.json").read_text())["id"]
    (tmp_path / "answer-3-search.json").write_text(json.dumps({"id": identity, "order": [1]}))
    assert oracle.ask(3, [1.0, 2.0], 1, True) == [1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", ["lightning", "hf"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_hosts_search_as_the_engine_does(accumulated: int, host: str, tmp_path: Path) -> None:
    from hf_tools import bert, texts
    from lightning_models import loader, net

    seen: list[list[Tensor]] = []

    def oracle(outputs: list[Any]) -> list[int]:
        seen.append(outputs)
        return smallest_first(outputs)

    ended = run(host, tmp_path, oracle, search=2, accumulated=accumulated)
    asked, seen[:] = list(seen), []
    assert len(asked) == 6
    model: Any = bert(0, dropout=0.0).train() if host == "hf" else net().train()
    lr, eps = (1e-2, 0.1) if host == "hf" else (0.01, 1e-3)
    optimizer = ZOOptimizer(model, lr=lr, eps=eps, estimator=RankSGD(3, search=2), objective=Ranking(oracle))
    rows, batches = texts() if host == "hf" else [], iter(loader(shuffle=False))
    for step in range(3):
        for part in range(accumulated):
            if host == "hf":
                begin = 4 * (step * accumulated + part)
                four = rows[begin : begin + 4]
                inputs = {name: torch.tensor([row[name] for row in four]) for name in four[0]}
                optimizer.estimate(lambda inputs=inputs: {"preds": model(**inputs).logits}, loss_of=optimizer.objective.loss_of)
            else:
                batch = next(batches)
                optimizer.estimate(lambda batch=batch: {"outputs": model(batch[0])}, loss_of=optimizer.objective.loss_of)
        optimizer.apply()
    assert len(seen) == 6
    for ours, theirs in zip(asked, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    prefix = "" if host == "hf" else "net."
    assert same({name.removeprefix(prefix): tensor for name, tensor in ended.items()}, snapshot(model))
