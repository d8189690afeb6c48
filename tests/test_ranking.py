"""RankSGD and the objective of rankings, in the engine alone: against a naive reference, with bad oracles, over kills."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, mlp, regression, same, snapshot
from ranking_worker import run, smallest_first
from reference.spsa import Settings, noise_like
from torch import Tensor, nn
from torch.func import functional_call

from zo_lightning.engine import SPSA, RankSGD, ZOOptimizer, ZOWarning
from zo_lightning.engine.objectives import FileOracle, Ranking, TerminalOracle
from zo_lightning.engine.trajectory import replay

ROOT = Path(__file__).parent.parent
EPS, LR = 0.1, 0.02


def error_of(output: Any) -> float:
    """What the oracles of these tests prefer less of."""
    return float((output - regression()[1]).square().mean())


def best_first(outputs: list[Any]) -> list[int]:
    return sorted(range(len(outputs)), key=lambda i: error_of(outputs[i]))


def edges(values: Sequence[float], top: int) -> list[tuple[int, int]]:
    """(better, worse) of every comparison that counts, from the definition; ties are broken by position."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    return [(order[a], order[b]) for a in range(len(order)) for b in range(a + 1, len(order)) if a < top]


# ---- the estimator


@pytest.mark.parametrize("samples", range(2, 9))
def test_weights_are_the_edges_of_the_paper_and_sum_to_zero(samples: int) -> None:
    draw = np.random.default_rng(samples)
    for top in range(1, samples + 1):
        estimator = RankSGD(samples, top)
        for order in draw.permuted(np.tile(np.arange(samples), (10, 1)), axis=1).tolist():
            pairs = edges(order, top)
            assert estimator.edges == len(pairs) == top * (top - 1) // 2 + top * (samples - top)
            counted = [sum(worse == i for _, worse in pairs) - sum(better == i for better, _ in pairs) for i in range(samples)]
            assert estimator.weights(order) == counted
            assert sum(counted) == 0
            terms = estimator.terms(estimator.points(lambda i: 100 + i), order)
            assert [term.seed for term in terms] == [100 + i for i in range(samples)]
            assert [term.slope for term in terms] == [w / len(pairs) for w in counted]


def test_equal_values_share_their_places() -> None:
    for values in product(range(3), repeat=4):
        for top in range(1, 5):
            weights = RankSGD(4, top).weights(values)
            assert math.isclose(math.fsum(weights), 0.0, abs_tol=1e-12)
            refined = [p for p in permutations(range(4)) if all(p[i] < p[j] for i in range(4) for j in range(4) if values[i] < values[j])]
            mean = np.mean([RankSGD(4, top).weights(p) for p in refined], axis=0)
            assert weights == pytest.approx(mean.tolist(), abs=1e-12)


def naive(steps: int, samples: int, top: int, noise: str) -> dict[str, Tensor]:
    """z as whole tensors, a sum over edges, and the step size of the paper, lr / eps."""
    model, x = mlp(), regression()[0]
    theta = dict(snapshot(model))
    settings = Settings(LR, eps=EPS, noise=noise)
    for step in range(steps):
        z = [noise_like(theta, settings, step, i) for i in range(samples)]
        errors = [error_of(functional_call(model, {name: w + EPS * z[i][name] for name, w in theta.items()}, (x,))) for i in range(samples)]
        pairs = edges(errors, top)
        for name, w in theta.items():
            estimate = sum((z[worse][name] - z[better][name] for better, worse in pairs), torch.zeros_like(w)) / len(pairs)
            theta[name] = w - LR / EPS * estimate
    return theta


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize(("samples", "top", "noise"), [(4, 4, "rademacher"), (5, 1, "gaussian"), (5, 3, "rademacher")])
def test_steps_are_those_of_the_naive_reference(samples: int, top: int, noise: str, weights: Any) -> None:
    model, x = mlp(), regression()[0]
    objective = Ranking(lambda outputs: best_first(outputs)[:top], top=top)
    estimator = RankSGD(samples, top)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, noise=noise, estimator=estimator, objective=objective, weights=weights)
    for _ in range(5):
        optimizer.step(lambda: {"outputs": model(x)})
        assert optimizer.report is not None
        assert sorted(optimizer.report.values) == [float(min(i, top)) for i in range(samples)]
        assert optimizer.report.score is None
    expected = naive(5, samples, top, noise)
    tolerance = 1e-12 if noise == "rademacher" else 1e-6  # Gaussian z is computed in float32
    with optimizer.settled():
        assert all(float((p - expected[name]).abs().max()) < tolerance for name, p in model.state_dict().items())


def test_losses_are_ranked_where_no_objective_is() -> None:
    x, y = regression()
    model = mlp()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator="rank_sgd")
    assert optimizer.estimator == RankSGD(5)
    for _ in range(3):
        optimizer.step(lambda: (model(x) - y).square().mean())
    expected = naive(3, 5, 5, "rademacher")
    assert all(float((p - expected[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())
    assert optimizer.report is not None
    assert optimizer.report.loss_plus == optimizer.report.loss_minus == optimizer.report.loss


@pytest.mark.parametrize(("samples", "top"), [(2, 1), (5, 1), (5, 5), (9, 3)])
def test_the_mean_estimate_points_along_the_gradient(samples: int, top: int) -> None:
    """Of a linear function all that is left of N estimates, across it, is noise: the cosine is near 1."""
    draw = np.random.default_rng(0)
    gradient, estimator = draw.standard_normal(20), RankSGD(samples, top)
    total = np.zeros(20)
    for _ in range(4000):
        z = draw.standard_normal((samples, 20))
        total += np.array(estimator.weights((z @ gradient).tolist())) @ z
    assert total @ gradient / np.linalg.norm(total) / np.linalg.norm(gradient) > 0.97


def quadratic(x: Tensor) -> float:
    return float(x.square().sum())


def rosenbrock(x: Tensor) -> float:
    return float((100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum())


@pytest.mark.parametrize(("function", "fall"), [(quadratic, 1e-3), (rosenbrock, 0.02)])
def test_it_converges_from_rankings_alone(function: Callable[[Tensor], float], fall: float) -> None:
    x = nn.Parameter(torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    objective = Ranking(lambda outputs: sorted(range(5), key=lambda i: function(outputs[i])))
    optimizer = ZOOptimizer([x], lr=0.0, eps=1e-3, noise="gaussian", estimator=RankSGD(5), objective=objective)
    before, steps = function(x.detach()), 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.05 * (1 - step / steps)
        optimizer.step(lambda: {"outputs": x})
    assert function(x.detach()) < fall * before


# ---- the objective


def ranked(oracle: Any, steps: int = 3, weights: Any = "exact", micro_batches: int = 1, **options: Any) -> tuple[Any, ZOOptimizer]:
    model, x = mlp(), regression()[0]
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=RankSGD(3), objective=Ranking(oracle, **options))
    for _ in range(steps):
        for rows in torch.arange(16).chunk(micro_batches):
            optimizer.estimate(lambda rows=rows: {"outputs": model(x[rows])}, weight=1 / micro_batches, batch=x[rows])
        optimizer.apply()
    return model, optimizer


def test_accumulated_outputs_are_joined_and_asked_about_once() -> None:
    asked: list[list[Tensor]] = []

    def oracle(outputs: list[Tensor]) -> list[int]:
        asked.append(outputs)
        return best_first(outputs)

    whole, _ = ranked(oracle)
    parts, _ = ranked(oracle, micro_batches=4)
    assert [[tuple(output.shape) for output in outputs] for outputs in asked] == [[(16, 1)] * 3] * 6
    assert all(float((p - parts.state_dict()[name]).abs().max()) < 1e-12 for name, p in whole.state_dict().items())


def test_texts_of_micro_batches_are_a_list() -> None:
    asked: list[Any] = []
    ranked(lambda outputs: asked.extend(outputs) or [0, 1, 2], 1, source=lambda module, batch: f"{len(batch)} rows", micro_batches=2)
    ranked(lambda outputs: asked.extend(outputs) or [0, 1, 2], 1, source=lambda module, batch: f"{len(batch)} rows")
    assert asked == [["8 rows", "8 rows"]] * 3 + ["16 rows"] * 3


def test_sources_see_the_perturbed_model_and_no_closure_is_called() -> None:
    plain, _ = ranked(best_first)
    model, x = mlp(), regression()[0]
    objective = Ranking(best_first, source=lambda module, batch: module(batch))
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(3), objective=objective, weights="exact")
    for _ in range(3):
        optimizer.step(lambda: pytest.fail("called"), batch=x)
    assert same(snapshot(model), snapshot(plain))


def test_two_points_of_spsa_can_be_ranked() -> None:
    """A duel: the sign of the difference is the slope."""
    model, x = mlp(), regression()[0]
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=SPSA(), objective=Ranking(best_first))
    optimizer.step(lambda: {"preds": model(x)})
    assert optimizer.report is not None
    assert sorted(optimizer.report.values) == [0.0, 1.0]
    assert abs(optimizer.report.projected_grad) == pytest.approx(0.5 / EPS)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "one twice": ([0, 1, 1], ValueError, r"'oracle' returned at step 0 must be an order of the 3 outputs: all of 0 to 2"),
    "too short": ([0, 1], ValueError, r"It is \[0, 1\]"),
    "too long": ([0, 1, 2, 0], ValueError, r"It is \[0, 1, 2, 0\]"),
    "an index that is none": ([0, 1, 3], ValueError, r"something else: \[0, 1, 3\]"),
    "below zero": ([0, 1, -1], ValueError, r"something else"),
    "floats": ([0.0, 1.0, 2.0], ValueError, r"something else"),
    "bools": ([False, True, 2], ValueError, r"something else"),
    "a text": ("012", ValueError, r"It is str"),
    "nothing": (None, ValueError, r"It is NoneType: None"),
    "a number": (1, ValueError, r"It is int: 1"),
    "a scalar tensor": (torch.tensor(1), ValueError, r"It is Tensor"),
    "an error": (KeyError("who?"), RuntimeError, r"The oracle 'oracle', asked at step 0, failed with KeyError: 'who\?'"),
    "a timeout": (TimeoutError("gone home"), TimeoutError, r"The oracle 'oracle', asked at step 0, did not answer: gone home"),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt, r"^$"),
}


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("case", BAD)
def test_bad_answers_leave_the_weights_and_the_same_question_comes_again(case: str, weights: Any) -> None:
    answer, error, message = BAD[case]
    asked: list[list[Tensor]] = []

    def oracle(outputs: list[Tensor]) -> Any:
        asked.append(outputs)
        if len(asked) == 1:
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return best_first(outputs)

    model, x = mlp(), regression()[0]
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=RankSGD(3), objective=Ranking(oracle))
    before = optimizer.module.state_dict() if weights is STREAMED else snapshot(model)  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(error, match=message):
        optimizer.step(lambda: {"outputs": model(x)})
    if weights == "inplace":
        assert all(float((p - before[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())
    else:
        assert same(before, snapshot(model))
    assert optimizer.steps == 0
    optimizer.step(lambda: {"outputs": model(x)})
    for first, second in zip(*asked, strict=True):
        assert torch.allclose(first, second, rtol=0, atol=1e-12 if weights == "inplace" else 0.0)
    good, _ = ranked(best_first, 1, weights)
    assert all(float((p - good.state_dict()[name]).abs().max()) < 1e-9 for name, p in model.state_dict().items())


def test_orders_may_be_arrays_and_tensors() -> None:
    expected, _ = ranked(best_first)
    for kind in (tuple, np.array, torch.tensor):
        model, _ = ranked(lambda outputs, kind=kind: kind(best_first(outputs)))
        assert same(snapshot(expected), snapshot(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankSGD(1), r"Invalid samples: 1\. Must be an integer >= 2"),
        (lambda: RankSGD(2.0), r"Invalid samples: 2\.0"),  # type: ignore[arg-type]
        (lambda: RankSGD(3, 0), r"Invalid top: 0"),
        (lambda: RankSGD(3, 4), r"Invalid top: 4\. There are samples=3 points"),
        (lambda: Ranking(3), r"oracle=3 is neither"),  # type: ignore[arg-type]
        (lambda: Ranking(FileOracle), r"oracle=FileOracle is a class"),  # type: ignore[arg-type]
        (lambda: Ranking(best_first, top=0), r"Invalid top: 0"),
        (lambda: Ranking(best_first, source=3), r"source=3"),  # type: ignore[arg-type]
        (lambda: FileOracle("x", timeout=0), r"Invalid timeout: 0"),
        (lambda: FileOracle("x", poll=0), r"Invalid poll: 0"),
        (lambda: FileOracle("x", show="text"), r"show='text'"),  # type: ignore[arg-type]
        (lambda: ZOOptimizer(mlp(), clip=1.0, estimator=RankSGD()), r"Invalid clip: 1\.0 with estimator=RankSGD"),
        (lambda: ZOOptimizer(mlp(), clip=1.0, estimator="rank_sgd"), r"Invalid clip: 1\.0"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_closure_without_outputs_is_told_what_is_missing() -> None:
    model, x = mlp(), regression()[0]
    with pytest.raises(
        ValueError,
        match=r"ranks outputs, and the closure returned Tensor\. Return \{'outputs': \.\.\.\} there .*training_step\), or give source=",
    ):
        ZOOptimizer(model, estimator=RankSGD(), objective=Ranking(best_first)).step(lambda: model(x).mean())


def test_a_state_saved_inside_a_window_goes_on_with_the_same_question() -> None:
    asked: list[list[Tensor]] = []

    def oracle(outputs: list[Tensor]) -> list[int]:
        asked.append(outputs)
        return best_first(outputs)

    x = regression()[0]

    def half(model: Any, optimizer: ZOOptimizer, rows: slice) -> None:
        optimizer.estimate(lambda: {"outputs": model(x[rows])}, weight=0.5)

    def make() -> tuple[Any, ZOOptimizer]:
        model = mlp()
        return model, ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(3), objective=Ranking(oracle))

    (model, optimizer), (again, resumed) = make(), make()
    half(model, optimizer, slice(0, 8))
    resumed.load_state_dict(optimizer.state_dict())
    for net, own in ((model, optimizer), (again, resumed)):
        half(net, own, slice(8, 16))
        own.apply()
    assert len(asked) == 2
    assert all(torch.equal(a, b) for a, b in zip(*asked, strict=True))
    assert same(snapshot(model), snapshot(again))


# ---- people


def test_the_terminal_asks_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter(["", "2 0", "2 0 x", "2, 0, 1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert TerminalOracle(lambda output: f"<{output}>").ask(7, ["a", "b", "c"], 3) == [2, 0, 1]
    said = capsys.readouterr().out
    assert "Step 7" in said
    assert "[1] <b>" in said
    assert said.count("The answer must be an order of the 3 outputs") == 2
    assert "invalid literal" in said
    typed = iter(["1"])
    assert TerminalOracle().ask(0, ["a", "b", "c"], 1) == [1]


def test_an_end_of_the_terminal_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError("closed")))
    with pytest.raises(RuntimeError, match=r"The oracle 'TerminalOracle', asked at step 0, failed with EOFError: closed"):
        ranked(TerminalOracle())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def answer(folder: Path, step: int, order: Any, **other: Any) -> None:
    question = read(folder / f"question-{step}.json")
    (folder / f"answer-{step}.json").write_text(json.dumps({"id": question["id"], "order": order, **other}))


def people(folder: Path, steps: int) -> threading.Thread:
    """Somebody who answers."""

    def work() -> None:
        for step in range(steps):
            while not (folder / f"question-{step}.json").exists():
                time.sleep(0.01)
            outputs = [torch.tensor(one, dtype=torch.float64) for one in read(folder / f"question-{step}.json")["outputs"]]
            answer(folder, step, best_first(outputs))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_answers_in_files_make_the_same_steps(tmp_path: Path) -> None:
    thread = people(tmp_path, 3)
    model, _ = ranked(FileOracle(tmp_path, timeout=60, poll=0.01))
    thread.join()
    expected, _ = ranked(best_first)
    assert same(snapshot(model), snapshot(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}-{i}.json" for kind in ("answer", "question") for i in range(3)]
    again, _ = ranked(FileOracle(tmp_path, timeout=0.1, poll=0.01))  # the answers are there
    assert same(snapshot(again), snapshot(expected))


def test_no_answer_in_time(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"The oracle 'FileOracle', asked at step 0, did not answer: There was no .*answer-0"):
        ranked(FileOracle(tmp_path, timeout=0.05, poll=0.01))
    first = (tmp_path / "question-0.json").read_bytes()
    answer(tmp_path, 0, [2, 1, 0])
    with pytest.raises(TimeoutError, match="asked at step 1"):
        ranked(FileOracle(tmp_path, timeout=0.05, poll=0.01))
    assert (tmp_path / "question-0.json").read_bytes() == first


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda folder: answer(folder, 0, [0, 1, 2], id="other"),
            RuntimeError,
            r"answer-0\.json answers another question: its id is 'other'",
        ),
        (lambda folder: answer(folder, 0, [0, 1]), RuntimeError, r"answer-0\.json must be an order of the 3 outputs"),
        (lambda folder: (folder / "answer-0.json").write_text("[0, 1, 2]"), RuntimeError, r'must be \{"id": "[0-9a-f]{32}", "order"'),
    ],
)
def test_answers_that_are_refused(spoil: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    oracle = FileOracle(tmp_path, timeout=0.05, poll=0.01)
    with pytest.raises(TimeoutError):
        ranked(oracle)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        ranked(oracle)


def test_an_answer_that_is_still_written_is_waited_for(tmp_path: Path) -> None:
    oracle = FileOracle(tmp_path, timeout=0.1, poll=0.01)
    with pytest.raises(TimeoutError):
        oracle.ask(0, ["a", "b"], 2)
    identity = read(tmp_path / "question-0.json")["id"]
    (tmp_path / "answer-0.json").write_text('{"id": "')
    with pytest.warns(ZOWarning, match=r"answer-0\.json is not JSON"), pytest.raises(TimeoutError):
        oracle.ask(0, ["a", "b"], 2)
    (tmp_path / "answer-0.json").write_text(json.dumps({"id": identity, "order": [1, 0]}))
    assert oracle.ask(0, ["a", "b"], 2) == [1, 0]
    with pytest.raises(ValueError, match="answers another question"):
        oracle.ask(0, ["a", "c"], 2)


def test_outputs_that_json_does_not_know(tmp_path: Path) -> None:
    oracle = FileOracle(tmp_path, timeout=0.01, poll=0.01)
    with pytest.raises(TypeError, match=r"object can't be written into a question.*show="):
        oracle.ask(0, [object()], 1)
    with pytest.raises(TimeoutError):
        oracle.ask(0, [{"a": torch.tensor([1.0, math.nan]), "b": (np.arange(2), True, None)}], 1)
    assert read(tmp_path / "question-0.json")["outputs"] == [{"a": [1.0, "nan"], "b": [[0, 1], True, None]}]
    shown = FileOracle(tmp_path, timeout=0.01, poll=0.01, show=str.upper)
    with pytest.raises(TimeoutError):
        shown.ask(1, ["a"], 1)
    assert read(tmp_path / "question-1.json")["outputs"] == ["A"]


# ---- hosts, kills


def until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait, as long as the process lives."""
    while not there():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def answer_by_numbers(folder: Path, step: int) -> None:
    answer(folder, step, smallest_first(read(folder / f"question-{step}.json")["outputs"]))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("host", "meanwhile"), [("lightning", True), ("hf", False)], ids=["answered while it was dead", "answered later"])
def test_a_run_killed_while_it_waits_asks_the_same_question(host: str, meanwhile: bool, tmp_path: Path) -> None:
    """And none of those before: their files are gone, and they are not written again."""
    folder, asked = tmp_path / "run", tmp_path / "questions"
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZO_LIGHTNING_COMPILE": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "ranking_worker.py"), host, str(folder), str(asked)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    first = start()
    try:
        until((asked / "question-0.json").exists, first)
        answer_by_numbers(asked, 0)
        until((asked / "question-1.json").exists, first)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == -signal.SIGKILL
    question = (asked / "question-1.json").read_bytes()
    (asked / "question-0.json").unlink()
    (asked / "answer-0.json").unlink()
    if meanwhile:
        answer_by_numbers(asked, 1)
    (asked / "question-1.json").unlink()
    second = start()
    try:
        until((asked / "question-1.json").exists, second)
        assert (asked / "question-1.json").read_bytes() == question
        if not meanwhile:
            answer_by_numbers(asked, 1)
        until((asked / "question-2.json").exists, second)
        answer_by_numbers(asked, 2)
        _, errors = second.communicate(timeout=120)
    finally:
        second.kill()
    assert second.returncode == 0, errors
    assert not (asked / "question-0.json").exists()
    whole = tmp_path / "whole"
    whole.mkdir()
    subprocess.run([*command[:3], str(whole)], env=environment, check=True, capture_output=True)  # threads as many as there
    assert same(torch.load(folder / "end.pt"), torch.load(whole / "end.pt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", ["lightning", "hf"])
def test_the_hosts_make_the_engines_steps(host: str, tmp_path: Path) -> None:
    from hf_tools import bert, texts
    from lightning_models import loader, net

    steps: list[list[Any]] = []

    def oracle(outputs: list[Any]) -> list[int]:
        steps.append(outputs)
        return smallest_first(outputs)

    ended = run(host, tmp_path, oracle)
    assert len(steps) == 3
    model: Any = bert(0, dropout=0.0).train() if host == "hf" else net().train()
    lr, eps = (1e-2, 0.1) if host == "hf" else (0.01, 1e-3)
    optimizer = ZOOptimizer(model, lr=lr, eps=eps, estimator=RankSGD(3), objective=Ranking(oracle))
    rows = texts() if host == "hf" else []
    for step, batch in zip(range(3), loader(shuffle=False), strict=False):
        if host == "hf":
            four = rows[4 * step : 4 * step + 4]
            inputs = {name: torch.tensor([row[name] for row in four]) for name in four[0]}
            optimizer.step(lambda inputs=inputs: {"preds": model(**inputs).logits})
        else:
            optimizer.step(lambda batch=batch: {"outputs": model(batch[0])})
    assert len(steps) == 6
    for ours, theirs in zip(steps[:3], steps[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    prefix = "" if host == "hf" else "net."
    assert same({name.removeprefix(prefix): tensor for name, tensor in ended.items()}, snapshot(model))


@pytest.mark.filterwarnings("ignore")
def test_accumulation_and_sources_under_the_hosts(tmp_path: Path) -> None:
    from hf_tools import bert, texts, trainer

    from zo_lightning.callbacks import RankingObjective

    asked: list[Any] = []

    def oracle(outputs: list[Any]) -> list[int]:
        asked.append([tuple(output.shape) for output in outputs])
        return smallest_first(outputs)[:1]

    def source(module: nn.Module, batch: Any) -> Tensor:
        return module(**batch).logits[:, 0]

    own = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "zo_eps": 0.1, "learning_rate": 1e-2}
    trainer(tmp_path, bert(0, dropout=0.0), data=texts(), callbacks=[RankingObjective(oracle, samples=4, top=1)], **own).train()
    assert asked == [[(8, 2)] * 4] * 2
    asked.clear()
    objective = RankingObjective(oracle, samples=4, top=1, source=source)
    trainer(tmp_path, bert(0, dropout=0.0), data=texts(), callbacks=[objective], **own).train()
    assert asked == [[(8,)] * 4] * 2


def test_the_callback_refuses_what_it_would_replace() -> None:
    from zo_lightning.callbacks import MetricObjective, RankingObjective
    from zo_lightning.engine import EngineOptions

    callback = RankingObjective(best_first, samples=4, top=2)
    options = callback.configure(EngineOptions())
    assert options.estimator == RankSGD(4, 2)
    assert callback.configure(options) == options
    for estimator in (SPSA(4), RankSGD(3)):
        with pytest.raises(ValueError, match=r"RankingObjective estimates with RankSGD\(samples=4, top=2, .*\), and the estimator is"):
            callback.configure(EngineOptions(estimator=estimator))
    with pytest.raises(ValueError, match="There are two objectives"):
        callback.configure(MetricObjective(lambda preds, target: 1.0).configure(EngineOptions()))


def test_a_step_log_of_rankings_is_replayed(tmp_path: Path) -> None:
    from trajectory_tools import Recorder

    model, x = mlp(dtype=torch.float32), regression(torch.float32)[0]
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=RankSGD(4, 2), objective=Ranking(best_first))
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(4):
        optimizer.step(lambda: {"outputs": model(x)})
    recorder.writer.close()
    again = mlp(dtype=torch.float32)
    assert replay(again, tmp_path / "run.zolog") == 4
    assert same(snapshot(model), snapshot(again))
