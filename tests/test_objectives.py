"""Objectives without a gradient, in the engine alone: against a naive reference, over micro-batches, processes and kills."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from engine_models import RESIDENCIES, mlp, regression, same, snapshot
from reference.spsa import Settings, spsa_step
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassF1Score

from zo_lightning.engine import SPSA, Safeguard, ZOOptimizer, ZOWarning
from zo_lightning.engine.objectives import Objective, Ramp, Score

EPS = 0.3
"""Large enough that metrics of 16 rows change."""


def binary() -> tuple[Tensor, Tensor]:
    """(16, 10) inputs, (16,) labels, a third of them 1, so that F1 of parts is not that of the whole."""
    x, _ = regression(rows=16)
    return x, (x[:, 0] > 0.4).long()


def answers(model: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    logits = model(x)[:, 0]
    return {"preds": logits.sigmoid(), "target": y, "loss": nn.functional.binary_cross_entropy_with_logits(logits, y.double())}


def f1(preds: Tensor, target: Tensor) -> float:
    """Written out: 2 tp / (2 tp + fp + fn), 0 for 0 / 0."""
    said = preds > 0.5
    tp, wrong = int((said & (target == 1)).sum()), int((said != (target == 1)).sum())
    return 2 * tp / (2 * tp + wrong) if tp else 0.0


def train(
    objective: Objective | None, steps: int = 6, micro_batches: int = 1, **options: Any
) -> tuple[Any, ZOOptimizer, list[tuple[float, ...]]]:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=options.pop("lr_of", 0.5), eps=EPS, objective=objective, **options)
    x, y = binary()
    seen = []
    for _ in range(steps):
        for rows in torch.arange(16).chunk(micro_batches):
            optimizer.estimate(lambda rows=rows: answers(model, x[rows], y[rows]), weight=1 / micro_batches)
        report = optimizer.apply()
        assert report is not None
        seen.append(report.values)
    return model, optimizer, seen


def naive(value: Callable[[dict[str, Tensor]], float], steps: int = 6, queries: int = 1) -> tuple[dict[str, Tensor], list[list[float]]]:
    """SPSA that materialises z, on a value of the whole batch."""
    model = mlp()
    x, y = binary()
    theta = dict(snapshot(model))
    seen = []
    for step in range(steps):
        theta, values = spsa_step(
            theta,
            lambda weights: value(answers(lambda x: functional_call(model, weights, (x,)), x, y)),
            Settings(lr=0.5, eps=EPS, queries=queries),
            step,
        )
        seen.append(values)
    return theta, seen


CASES: dict[str, tuple[Callable[[], Objective], Callable[[dict[str, Any]], float]]] = {
    "F1, a torchmetrics Metric": (lambda: Score(BinaryF1Score()), lambda out: -f1(out["preds"], out["target"])),
    "F1, a function": (lambda: Score(f1), lambda out: -f1(out["preds"], out["target"])),
    "errors, minimised": (
        lambda: Score(lambda preds, target: ((preds > 0.5) != target.bool()).double().mean(), maximize=False),
        lambda out: float(((out["preds"] > 0.5) != out["target"].bool()).double().mean()),
    ),
    "a Metric that says that less is better": (
        lambda: Score(torchmetrics.MeanSquaredError()),
        lambda out: float(((out["preds"] - out["target"]) ** 2).mean()),
    ),
    "F1 and the loss": (
        lambda: Score(f1, loss_weight=0.25, weight=2.0),
        lambda out: 0.25 * float(out["loss"]) - 2.0 * f1(out["preds"], out["target"]),
    ),
    "one of a collection": (
        lambda: Score(torchmetrics.MetricCollection([BinaryAccuracy(), BinaryF1Score()]), key="BinaryF1Score"),
        lambda out: -f1(out["preds"], out["target"]),
    ),
    "one of a vector": (
        lambda: Score(MulticlassF1Score(2, average=None), key=1, preprocess=lambda preds, target: ((preds > 0.5).long(), target)),
        lambda out: -f1(out["preds"], out["target"]),
    ),
}


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_the_naive_reference_on_the_whole_batch(case: str, micro_batches: int, weights: str) -> None:
    """Of F1, the mean over micro-batches is another number than that of the whole batch, which is what counts."""
    make, value = CASES[case]
    model, optimizer, seen = train(make(), micro_batches=micro_batches, weights=weights, estimator=SPSA(2))
    expected, values = naive(value, queries=2)
    assert len({round(v, 6) for row in seen for v in row}) > 3, "the metric never changed: nothing was tested"
    for ours, theirs in zip(seen, values, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)  # metrics compute in float32
    assert all(float((p - expected[name]).abs().max()) < 1e-5 for name, p in model.state_dict().items())
    assert optimizer.report is not None
    assert optimizer.report.score is not None


def test_f1_of_parts_would_have_been_another_number() -> None:
    x, y = binary()
    out = answers(mlp(), x, y)
    parts = [f1(out["preds"][rows], out["target"][rows]) for rows in torch.arange(16).chunk(4)]
    assert sum(parts) / 4 != pytest.approx(f1(out["preds"], out["target"]), abs=1e-3)


def test_a_ramp_goes_from_the_loss_to_the_metric() -> None:
    both = Score(f1, loss_weight=Ramp(1.0, 0.0, 4), weight=Ramp(0.0, 1.0, 4))
    _, _, seen = train(both, steps=6)
    model, step = mlp(), iter(range(100))
    x, y = binary()
    theta = dict(snapshot(model))

    def value(weights: dict[str, Tensor], share: float) -> float:
        out = answers(lambda x: functional_call(model, weights, (x,)), x, y)
        return (1 - share) * float(out["loss"]) - share * f1(out["preds"], out["target"])

    for row in seen:
        at = next(step)
        share = min(1.0, at / 4)
        theta, values = spsa_step(theta, lambda weights, share=share: value(weights, share), Settings(lr=0.5, eps=EPS), at)
        assert row == pytest.approx(values, abs=1e-9)
    assert Ramp(2.0, 1.0, 10, begin=5)(0) == 2.0
    assert Ramp(2.0, 1.0, 10, begin=5)(10) == 1.5


def test_a_number_of_a_callable_or_a_method_is_the_mean_over_micro_batches() -> None:
    class Judged(nn.Sequential):
        def judge(self, batch: Tensor) -> float:
            return float((self(batch) > 0).double().mean())

    model = Judged(*mlp())
    x, _ = binary()
    for source in ("judge", lambda module, batch: module.judge(batch)):
        optimizer = ZOOptimizer(copy.deepcopy(model), lr=0.1, eps=EPS, objective=Score(source=source))
        before = snapshot(optimizer.module)
        for rows in torch.arange(16).chunk(2):
            assert not optimizer.objective.needs_output
            optimizer.estimate(dict, weight=0.5, batch=x[rows])
        report = optimizer.apply()
        assert report is not None
        z = {name: p - before[name] for name, p in optimizer.module.state_dict().items()}
        assert any(bool(change.any()) for change in z.values()) == (report.values[0] != report.values[1])
        assert -16 * report.values[0] == pytest.approx(round(-16 * report.values[0]))


def test_the_users_metric_keeps_its_state() -> None:
    own = BinaryF1Score()
    own.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 1]))
    before = copy.deepcopy(own.metric_state)
    _, optimizer, _ = train(Score(own), steps=3)
    assert all(torch.equal(before[name], own.metric_state[name]) for name in before)
    assert all(not bool(state.any()) for state in optimizer.objective.metric.metric_state.values())


def test_padding_is_left_out_of_token_predictions() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    target[:, 3:] = -100
    preds, kept = Score(f1).observe({"preds": logits, "target": target}, None, None)
    assert preds.shape == (9, 7)
    assert torch.equal(kept, target[:, :3].flatten())
    assert torch.equal(preds, logits[:, :3].flatten(0, 1))
    whole, same_target = Score(f1, ignore_index=None).observe({"preds": logits, "target": target}, None, None)
    assert torch.equal(whole, logits)
    assert torch.equal(same_target, target)
    assert whole.data_ptr() != logits.data_ptr()


# ---- what goes wrong


def hard(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (preds > 0.5).long(), target


MISTAKES: dict[str, tuple[Callable[[], Objective], str]] = {
    "a dict without a key": (lambda: Score(lambda preds, target: {"f1": 0.5, "em": 0.1}), r"returns 'f1', 'em'\. Choose one: key='f1'"),
    "a key that is not there": (lambda: Score(lambda preds, target: {"f1": 0.5}, key="f2"), r"key is 'f2'"),
    "a vector without an index": (lambda: Score(MulticlassF1Score(2, average=None)), r"returns 2 numbers\. Choose one, key=0"),
    "a key of one number": (lambda: Score(f1, key="f1"), r"key='f1' is given, and f1\[f1\] returns one number"),
    "a text": (lambda: Score(lambda preds, target: "good"), r"must give one number, and gave str: 'good'"),
    "nothing": (lambda: Score(lambda preds, target: None), r"must give one number, and gave NoneType"),
    "classes never seen": (
        lambda: Score(MulticlassF1Score(2, validate_args=True), preprocess=lambda p, t: ((p > 0.5).long(), t + 5)),
        r".",
    ),
    "a metric that raises": (lambda: Score(lambda preds, target: 1 // 0), r"division"),
    "a preprocess that returns one thing": (lambda: Score(f1, preprocess=lambda preds, target: preds), r"returned Tensor: tensor\("),
    "an index too far": (
        lambda: Score(MulticlassF1Score(2, average=None), key=5, maximize=True, preprocess=hard),
        r"key=5 is not one of the 2",
    ),
    "a source that is no method": (lambda: Score(f1, source="judge"), r"source='judge' is not a method of Sequential"),
    "a source without predictions": (lambda: Score(f1, source=lambda module, batch: 1.0), r"needs 'preds' and 'target'"),
    "the host's metric without a host": (lambda: Score("compute_metrics"), r"is the Hugging Face Trainer's"),
    "a weight below zero": (lambda: Score(f1, weight=lambda step: -1.0), r"Invalid weight: -1\.0"),
}


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("case", MISTAKES)
def test_an_error_of_the_metric_leaves_the_weights_and_the_run_goes_on(case: str, weights: str) -> None:
    make, message = MISTAKES[case]
    model = mlp()
    before = snapshot(model)
    x, y = binary()
    optimizer = ZOOptimizer(model, lr=0.5, eps=EPS, weights=weights, objective=make())
    with pytest.raises(Exception, match=message):
        optimizer.step(lambda: answers(model, x, y), batch=(x, y))
    if weights == "inplace":
        assert all(float((p - before[name]).abs().max()) < 1e-12 for name, p in model.state_dict().items())
    else:
        assert same(before, snapshot(model))
    optimizer.objective = Score(f1)
    optimizer.step(lambda: answers(model, x, y))
    assert optimizer.steps == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score(), "nothing to optimise"),
        (lambda: Score(BinaryF1Score), "BinaryF1Score is a class"),
        (lambda: Score(3.0), "neither a torchmetrics Metric nor a callable"),
        (lambda: Score("f1"), "neither a torchmetrics Metric nor a callable"),
        (lambda: Score(f1, maximize="yes"), "Invalid maximize"),
        (lambda: Score(f1, source=3), "source=3"),
        (lambda: Score(f1, preprocess=3), "preprocess=3"),
        (lambda: Score(f1, preprocess=lambda preds: preds), r"is not a callable \(preds, target\)"),
        (lambda: Score(f1, key=1.5), "Invalid key: 1.5"),
        (lambda: Score(f1, key=True), "Invalid key: True"),
        (lambda: Score(f1, ignore_index="x"), "Invalid ignore_index: 'x'"),
        (lambda: Score(f1, shift=1), "Invalid shift: 1"),
        (lambda: Score(torchmetrics.PearsonCorrCoef()), r"PearsonCorrCoef does not say whether more of it is better\. Say maximize="),
        (lambda: Score(torchmetrics.MeanSquaredError() * 2), "does not say whether more of it is better"),
        (lambda: Score(f1, loss_weight=-1.0), "Invalid loss_weight"),
        (lambda: Score(f1, weight=math.nan), "Invalid weight"),
        (lambda: Ramp(1.0, -1.0, 3), "Ramp end"),
        (lambda: Ramp(1.0, 1.0, 0), "Ramp steps"),
        (lambda: ZOOptimizer(mlp(), objective=f1), "Invalid objective"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_closure_without_predictions_or_loss_is_told_what_is_missing() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"needs 'preds' and 'target', and the closure's output is Tensor"):
        ZOOptimizer(model, objective=Score(f1)).step(lambda: model(binary()[0]).mean())
    with pytest.raises(ValueError, match=r"loss_weight=0\.5 needs the loss, and the closure returned only 'preds', 'target'"):
        ZOOptimizer(model, objective=Score(f1, loss_weight=0.5)).step(lambda: {"preds": torch.ones(2), "target": torch.ones(2)})


def test_wrapped_metrics_keep_their_direction() -> None:
    error = torchmetrics.MeanSquaredError
    for metric, key in (
        (torchmetrics.MinMaxMetric(error()), "raw"),
        (torchmetrics.MultioutputWrapper(error(), 2), 0),
        (torchmetrics.MetricCollection({"a": error(), "b": BinaryAccuracy()}), "a"),
        (torchmetrics.MetricCollection([error()]), None),
    ):
        assert not Score(metric, key=key).maximize
    assert Score(torchmetrics.MetricCollection({"a": error(), "b": BinaryAccuracy()}), key="b").maximize
    assert Score(error(), maximize=True).maximize


def test_tuples_and_arrays_of_micro_batches_are_joined() -> None:
    """As the start and end scores of a question's answer, or what sklearn's functions take."""
    asked = []

    def seen(preds: Any, target: Any) -> float:
        asked.append((preds, target))
        return 1.0

    def parts(preds: Tensor, target: Tensor) -> tuple[Any, Any]:
        return (preds, {"doubled": 2 * preds.numpy()}), target.numpy()

    train(Score(seen, preprocess=parts), steps=1, micro_batches=4)
    train(Score(seen, preprocess=parts), steps=1)
    (preds, more), target = asked[0]
    assert preds.shape == (16,)
    assert isinstance(target, np.ndarray)
    assert (more["doubled"] == 2 * preds.numpy()).all()
    assert all(np.allclose(a, b) for a, b in zip((preds, target), (asked[2][0][0], asked[2][1]), strict=True))


def test_shapes_that_are_no_tokens_stay_as_they_are() -> None:
    score, draw = Score(f1), torch.Generator().manual_seed(0)
    labels = torch.randint(2, (6, 3), generator=draw)
    for preds in (torch.rand(6, 3, generator=draw), labels):
        same_preds, target = score.observe({"preds": preds, "target": labels}, None, None)
        assert same_preds.shape == target.shape == (6, 3)
    preds, target = score.observe({"preds": torch.rand(6, 4), "target": torch.tensor([0, 1, -100, 2, 3, -100])}, None, None)
    assert preds.shape == (4, 4)
    assert target.tolist() == [0, 1, 2, 3]


def test_micro_batches_of_nothing_but_padding() -> None:
    model, x = mlp(), binary()[0]
    optimizer = ZOOptimizer(model, eps=EPS, objective=Score(MulticlassF1Score(2)))
    logits = lambda: torch.cat([-model(x), model(x)], 1)  # noqa: E731
    nothing, labels = torch.full((16,), -100), binary()[1]
    optimizer.estimate(lambda: {"preds": logits(), "target": nothing})
    optimizer.estimate(lambda: {"preds": logits(), "target": labels})
    report = optimizer.apply()
    assert report is not None
    assert not report.skipped
    optimizer.step(lambda: {"preds": logits(), "target": nothing})
    assert optimizer.skipped_steps == 1


def test_metrics_that_draw_draw_the_same_at_every_point() -> None:
    before = torch.get_rng_state()
    drawn = Score(lambda preds, target: float(torch.rand(())), maximize=True)
    _, optimizer, seen = train(drawn, steps=3)
    assert all(plus == minus for plus, minus in seen)
    assert len({plus for plus, _ in seen}) == 3
    torch.manual_seed(3)
    state = torch.get_rng_state()
    optimizer.step(lambda: answers(optimizer.module, *binary()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_a_source_is_asked_in_a_plain_loop_and_can_take_the_batch_apart() -> None:
    calls = []

    def source(module: Any, batch: dict[str, Tensor]) -> float:
        labels = batch.pop("y")
        return float(((module(batch["x"])[:, 0] > 0) == labels.bool()).double().mean())

    model, (x, y) = mlp(), binary()
    optimizer = ZOOptimizer(model, lr=0.5, eps=EPS, objective=Score(source=source))
    optimizer.step(lambda: calls.append(1), batch={"x": x, "y": y})
    assert calls == []
    assert optimizer.steps == 1
    with pytest.raises(ValueError, match=r"asked for the batch, and there is none\. Pass it: step\(closure, batch=batch\)"):
        optimizer.step(dict)


def test_the_safeguard_does_not_judge_a_changing_objective() -> None:
    changing = Score(f1, loss_weight=Ramp(0.0, 3.0, 40), weight=Ramp(1.0, 0.0, 40))
    _, optimizer, _ = train(changing, steps=60, lr_of=1e-9, safeguard=Safeguard(window=10))
    assert optimizer.steps == 60


def test_states_of_windows_without_samples() -> None:
    model = mlp()
    plain = ZOOptimizer(model, eps=EPS)
    plain.estimate(lambda: answers(model, *binary())["loss"])
    state = plain.state_dict()
    other = ZOOptimizer(mlp(), eps=EPS, objective=Score(f1))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="measured by a run without this objective"):
        other.apply()
    assert "samples" not in state["zo"]["window"]  # as states from before there were objectives
    measured = ZOOptimizer(model, eps=EPS, objective=Score(f1))
    measured.estimate(lambda: answers(model, *binary()))
    kept = measured.state_dict()["zo"]["window"]["samples"]
    measured.estimate(lambda: answers(model, *binary()))
    assert [len(own) for own in kept] == [1, 1]


def test_a_value_that_is_not_a_number_skips_the_step() -> None:
    model = mlp()
    before = snapshot(model)
    x, y = binary()
    optimizer = ZOOptimizer(model, lr=0.5, eps=EPS, objective=Score(lambda preds, target: math.nan))
    optimizer.step(lambda: answers(model, x, y))
    assert optimizer.skipped_steps == 1
    assert same(before, snapshot(model))


def test_a_micro_batch_without_a_loss_is_left_out() -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, objective=Score(f1))
    assert optimizer.estimate(lambda: None).loss is None
    assert optimizer.apply() is None


def test_a_checkpoint_in_the_middle_of_a_window_keeps_what_was_observed() -> None:
    whole, _, _ = train(Score(BinaryF1Score()), steps=2, micro_batches=4)

    def measure(model: Any, optimizer: ZOOptimizer, parts: range) -> None:
        x, y = binary()
        for rows in [slice(4 * i, 4 * i + 4) for i in parts]:
            optimizer.estimate(lambda rows=rows: answers(model, x[rows], y[rows]), weight=0.25)

    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.5, eps=EPS, objective=Score(BinaryF1Score()))
    measure(model, optimizer, range(4))
    optimizer.apply()
    measure(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = mlp(seed=3)
    other = ZOOptimizer(again, lr=0.5, eps=EPS, objective=Score(BinaryF1Score()))
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    measure(again, other, range(2, 4))
    other.apply()
    assert same(snapshot(whole), snapshot(again))


def test_a_column_of_outputs_beside_a_row_of_targets_is_said() -> None:
    model, (x, y) = mlp(), regression()

    def squares(preds: Tensor, target: Tensor) -> Tensor:
        return (preds - target).square().mean()

    def step(score: Score, target: Tensor) -> None:
        ZOOptimizer(model, lr=0.0, objective=score).step(lambda: {"preds": model(x), "target": target})  # type: ignore[arg-type]

    step(Score(squares, maximize=False), y)
    step(Score(squares, maximize=False, preprocess=lambda preds, target: (preds.squeeze(-1), target)), y[:, 0])
    with pytest.warns(ZOWarning, match=r"squares gets preds of shape \(16, 1\) and target of shape \(16,\): .* the shape \(16, 16\)"):
        step(Score(squares, maximize=False), y[:, 0])
