"""MetricObjective under both hosts: what the engine does on the same predictions, and what each host's users expect."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_tools import bert, llama, losses, same, texts, tokenizer, tokens, trainer, weights
from lightning_models import HOST_WARNINGS, Recorder, lightning, lit, loader, net, state
from lightning_models import trainer as lightning_trainer
from scissors import CutError, Scissors
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import SQuAD

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import MetricObjective, SparseMask, TrajectoryLog
from zo_lightning.engine import ZOOptimizer, ZOWarning
from zo_lightning.engine.objectives import Ramp, Score

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in HOST_WARNINGS],
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:.*had equal values on both sides:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings(r"ignore:The objective had the same value:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
]

F1 = {"num_classes": 2, "average": "macro"}


def hf(
    folder: Path, objective: Any, more: Any = (), model: Any = None, data: Any = None, seed: int = 0, **given: Any
) -> tuple[Any, Recorder]:
    seen = Recorder()
    model = bert(seed, dropout=0.0) if model is None else model
    own = {"max_steps": 4, "per_device_train_batch_size": 16, "zo_eps": 0.1, "learning_rate": 1e-2, **given}
    host = trainer(folder, model, data=data, callbacks=[objective, *more, seen], **own)
    return host, seen


def batches(data: list[dict[str, Any]], size: int, steps: int) -> list[dict[str, torch.Tensor]]:
    rows = [data[i % len(data)] for i in range(size * steps)]
    return [{k: torch.tensor([row[k] for row in rows[i : i + size]]) for k in rows[0]} for i in range(0, len(rows), size)]


def alone(model: Any, objective: Score, data: list[dict[str, Any]], steps: int = 4, **options: Any) -> tuple[Any, list[tuple[float, ...]]]:
    """The engine on a model of transformers."""
    optimizer, values = ZOOptimizer(model, lr=1e-2, eps=0.1, objective=objective, **options), []
    for batch in batches(data, 16, steps):
        optimizer.step(lambda batch=batch: {"preds": model(**batch).logits, "target": batch["labels"], "loss": model(**batch).loss})
        values.append(optimizer.report.values)
    return model, values


# ---- Hugging Face


@pytest.mark.parametrize("mixed", [False, True])
def test_the_trainer_makes_the_engines_steps(mixed: bool, tmp_path: Path) -> None:
    weight = {"loss_weight": Ramp(1.0, 0.0, 4)} if mixed else {}
    host, seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1), **weight))
    host.train()
    model, values = alone(bert(0, dropout=0.0).train(), Score(MulticlassF1Score(**F1), **weight), texts())
    assert len({value for row in values for value in row}) > 2
    assert seen.values == values
    assert same(weights(host.model), weights(model))


def test_accumulated_f1_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    whole, whole_seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)), model=bert(0, dropout=0.0, dtype=torch.float64))
    whole.train()
    own = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    parts, parts_seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)), model=bert(0, dropout=0.0, dtype=torch.float64), **own)
    parts.train()
    assert whole_seen.values == parts_seen.values
    assert same(weights(whole.model), weights(parts.model))


def test_charts_show_the_metric_and_the_loss_stays_the_loss(tmp_path: Path) -> None:
    host, seen = hf(tmp_path, MetricObjective(MulticlassAccuracy(2, average="micro")))
    host.train()
    plain, _ = hf(tmp_path, SparseMask("random", 1.0, summary=False), max_steps=1)
    plain.train()
    shown = losses(host, "zo/objective")
    assert shown == pytest.approx([-sum(row) / 2 for row in seen.values])
    assert losses(host, "zo/equal_values") == [float(a == b) for a, b in seen.values]
    assert losses(host)[0] == pytest.approx(losses(plain)[0])


def test_the_trainers_own_compute_metrics(tmp_path: Path) -> None:
    calls = []

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        calls.append(evaluated.predictions.shape)
        assert isinstance(evaluated.predictions, np.ndarray)
        return {"right": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}

    own = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "compute_metrics": compute_metrics}
    host, seen = hf(tmp_path, MetricObjective("compute_metrics", key="right"), **own)
    host.train()
    assert calls == [(16, 2)] * 8
    assert all(value * 16 == round(value * 16) for row in seen.values for value in row)
    with pytest.raises(ValueError, match=r"takes the Trainer's, which has none"):
        hf(tmp_path, MetricObjective("compute_metrics", key="right"))[0].train()
    host, _ = hf(tmp_path, MetricObjective("compute_metrics"), compute_metrics=lambda evaluated: {"right": 1.0, "wrong": 0.0})
    with pytest.raises(ValueError, match=r"returns 'right', 'wrong'\. Choose one: key='right'"):
        host.train()


def test_tokens_of_a_language_model_are_shifted_and_padding_is_left_out(tmp_path: Path) -> None:
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def right(preds: torch.Tensor, target: torch.Tensor) -> float:
        asked.append((preds, target))
        return float((preds.argmax(-1) == target).double().mean())

    data = tokens()
    host, seen = hf(tmp_path, MetricObjective(right), model=llama(), data=data, max_steps=1)
    host.train()
    batch = batches(data, 16, 1)[0]
    expected = batch["labels"][:, 1:]
    for preds, target in asked:
        assert torch.equal(target, expected[expected != -100])
        assert preds.shape == (len(target), 32)
    model = llama()
    ours = ZOOptimizer(model, lr=1e-2, eps=0.1, objective=Score(right))
    logits = lambda: model(**batch).logits[:, :-1]  # noqa: E731
    ours.step(lambda: {"preds": logits(), "target": expected})
    assert seen.values == [ours.report.values]


def test_texts_are_decoded(tmp_path: Path) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def overlap(preds: list[str], target: list[str]) -> float:
        asked.append((preds, target))
        return sum(len(set(a.split()) & set(b.split())) for a, b in zip(preds, target, strict=True)) / len(target)

    data = tokens()
    host, _ = hf(tmp_path, MetricObjective(overlap, tokenizer=tokenizer()), model=llama(), data=data, max_steps=1)
    host.train()
    rows = batches(data, 16, 1)[0]["labels"][:, 1:].tolist()
    assert asked[0][1] == [" ".join(f"w{i}" for i in row if i > 3) for row in rows]  # without padding and special tokens
    assert [len(text.split()) <= len(row) for text, row in zip(asked[0][0], rows, strict=True)] == [True] * 16
    assert any(asked[0][0])


@pytest.mark.parametrize("kind", ["llama", "subclass", "bart", "t5"])
def test_the_metric_sees_what_the_loss_is_of(kind: str, tmp_path: Path) -> None:
    """Cross-entropy as a metric is the model's own loss: logits are shifted where the loss shifts, hidden states are no predictions."""
    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bart":
        layers = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}
        model: Any = transformers.BartForCausalLM(transformers.BartConfig(**sizes, **layers, is_decoder=True))
    elif kind == "t5":
        layers = {"d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **layers))
    else:
        mine = type("Mine", (transformers.LlamaForCausalLM,), {})
        model = llama() if kind == "llama" else mine(llama().config)
    with torch.no_grad():
        loss = float(model(**batches(tokens(), 16, 1)[0]).loss)
    objective = MetricObjective(nn.functional.cross_entropy, maximize=False)
    host, seen = hf(tmp_path, objective, model=model, data=tokens(), max_steps=1, zo_eps=1e-6)
    host.train()
    assert seen.values[0] == pytest.approx((loss, loss), rel=1e-4)


def test_the_trainers_metrics_get_what_its_evaluation_gets(tmp_path: Path) -> None:
    """Not shifted, for they do it themselves, and all outputs."""
    asked: list[tuple[int, ...]] = []

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        asked.append(evaluated.predictions.shape)
        return {"right": float((evaluated.predictions[:, :-1].argmax(-1) == evaluated.label_ids[:, 1:]).mean())}

    own = {"compute_metrics": compute_metrics, "model": llama(), "data": tokens(16), "learning_rate": 1e-12, "max_steps": 1}
    host, seen = hf(tmp_path, MetricObjective("compute_metrics", key="right"), eval_dataset=tokens(16), zo_eps=1e-7, **own)
    host.train()
    found = host.evaluate()["eval_right"]
    assert set(asked) == {(16, 8, 32)}
    assert seen.values[0] == pytest.approx((-found, -found))


def test_a_source_runs_in_training_mode_and_in_the_hosts_precision(tmp_path: Path) -> None:
    modes: list[tuple[bool, bool]] = []

    def source(model: Any, batch: Any) -> float:
        batch.pop("labels")  # what it takes out is there at the next point
        modes.append((model.training, torch.is_autocast_enabled("cpu")))
        return float(model(**batch).logits.float().mean())

    own = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": texts(), "max_steps": 3, "bf16": True}
    hf(tmp_path, MetricObjective(source=source), **own)[0].train()
    assert modes == [(True, True)] * 6
    modes.clear()

    def lightning_source(own: Any, batch: Any) -> float:
        modes.append((own.training, torch.is_autocast_enabled("cpu")))
        return float(own.answers(batch)["preds"].float().mean())

    fit(tmp_path, MetricObjective(source=lightning_source), precision="bf16-mixed", max_epochs=1)
    assert modes == [(True, True)] * 8


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    from zo_lightning.hf_integration import ZOTrainer

    class Whole(ZOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            found = model(**inputs)
            return (found.loss, found.logits) if return_outputs else found.loss

    f1 = lambda: MetricObjective(MulticlassF1Score(**F1))  # noqa: E731
    plain, bare = hf(tmp_path, f1()), hf(tmp_path, f1(), kind=Whole)  # which returns logits alone
    for host, _ in (plain, bare):
        host.train()
    assert plain[1].values == bare[1].values
    with pytest.raises(ValueError, match=r"needs labels: the batch has .*'input_ids'.*label_names=\['truth'\]"):
        hf(tmp_path, f1(), label_names=["truth"])[0].train()
    for option, value in (("batch_eval_metrics", True), ("include_for_metrics", ["inputs"])):
        given = {option: value, "compute_metrics": lambda evaluated, compute_result=True: {"a": 1.0}}
        with pytest.raises(ValueError, match=f"{option}=.*Leave {option} out"):
            hf(tmp_path, MetricObjective("compute_metrics", key="a"), **given)[0].train()
    with pytest.raises(ValueError, match="tokenizer= does nothing for 'compute_metrics'"):
        MetricObjective("compute_metrics", tokenizer=tokenizer())
    with pytest.raises(TypeError, match="tokenizer='gpt2' is not a tokenizer"):
        MetricObjective(lambda preds, target: 1.0, tokenizer="gpt2")


def test_a_subclass_with_its_own_loss_is_asked_for_outputs(tmp_path: Path) -> None:
    from zo_lightning.hf_integration import ZOTrainer

    class Doubled(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            outputs = model(**inputs)
            return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss

    class Silent(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return model(**inputs).loss

    _, values = alone(bert(0, dropout=0.0).train(), Score(MulticlassF1Score(**F1)), texts())
    host, seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)), kind=Doubled)
    host.train()
    assert seen.values == values
    with_source, _ = hf(tmp_path, MetricObjective(source=lambda model, batch: 1.0, loss_weight=1.0), kind=Silent)
    with_source.train()
    assert losses(with_source)[0] > 0.1
    with pytest.raises(ValueError, match=r"Silent\.compute_loss\(return_outputs=True\) returned Tensor"):
        hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)), kind=Silent)[0].train()


def test_label_smoothing_pops_the_labels_and_they_are_seen_all_the_same(tmp_path: Path) -> None:
    plain, seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)))
    smooth, smooth_seen = hf(tmp_path, MetricObjective(MulticlassF1Score(**F1)), label_smoothing_factor=0.1)
    for host in (plain, smooth):
        host.train()
    assert seen.values == smooth_seen.values


def test_a_source_is_asked_instead_of_the_training_step(tmp_path: Path) -> None:
    passes: list[int] = []

    def share(model: Any, batch: Any) -> float:
        passes.append(len(batch["labels"]))
        assert not torch.is_grad_enabled()
        return float((model(input_ids=batch["input_ids"]).logits.argmax(-1) == batch["labels"]).double().mean())

    host, seen = hf(tmp_path, MetricObjective(source=share))
    host.train()
    _, values = alone(bert(0, dropout=0.0).train(), Score(MulticlassAccuracy(2, average="micro")), texts())
    assert passes == [16] * 8
    assert seen.values == [pytest.approx(row) for row in values]
    mixed, _ = hf(tmp_path, MetricObjective(source=share, loss_weight=1.0), max_steps=1)
    mixed.train()
    assert losses(mixed)[0] > 0.1


@pytest.mark.parametrize("save", [False, True])
def test_a_run_that_is_killed_goes_on(save: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    given |= {"save_strategy": "steps", "save_steps": 2} if save else {}
    make = lambda: MetricObjective(MulticlassF1Score(**F1), loss_weight=0.1)  # noqa: E731
    whole, _ = hf(tmp_path / "whole", make(), [TrajectoryLog()], **given)
    whole.train()
    cut, _ = hf(tmp_path / "cut", make(), [TrajectoryLog(), Scissors(5)], **given)
    with pytest.raises(CutError):
        cut.train()
    again, _ = hf(tmp_path / "cut", make(), [TrajectoryLog()], seed=0, **given)
    again.train()
    assert same(weights(whole.model), weights(again.model))


def test_two_objectives_and_wrong_options_are_refused(tmp_path: Path) -> None:
    class Other(MetricObjective):  # Lightning has a word of its own for two callbacks of one class
        pass

    for run in (hf, fit):
        with pytest.raises(ValueError, match=r"two objectives, 'MulticlassF1Score' and 'MulticlassAccuracy'"):
            run(tmp_path, MetricObjective(MulticlassF1Score(**F1)), more=[Other(MulticlassAccuracy(2))])
    with pytest.raises(ValueError, match="tokenizer= and preprocess= are both given"):
        MetricObjective(SQuAD(), key="f1", tokenizer=tokenizer(), preprocess=lambda preds, target: (preds, target))


@pytest.mark.filterwarnings("default::zo_lightning.engine.messages.ZOWarning")
def test_steps_without_a_difference_are_answered_with_advice(tmp_path: Path) -> None:
    host, _ = hf(tmp_path, MetricObjective(lambda preds, target: 1.0), max_steps=22)
    with pytest.warns(ZOWarning, match=r"had equal values on both sides in 20 of 20 steps.*larger eps, a larger batch"):
        host.train()


# ---- Lightning


def module(kind: str = "dict", dropout: float = 0.0, plain: bool = False) -> Any:
    """A classifier of the sign of the regression's target."""

    class Classifier(lit()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(without_statistics() if plain else net(dropout=dropout))
            self.accuracy = MulticlassAccuracy(2)
            self.calls, self.counts = 0, []

        def answers(self, batch: Any) -> dict[str, torch.Tensor]:
            x, y = batch
            logits = self.net(x / torch.tensor([100.0, 1, 1, 1, 1, 1]))
            return {"preds": torch.cat([-logits, logits], 1), "target": (y[:, 0] > 0).long()}

        def on_train_epoch_end(self) -> None:
            self.counts.append(self.accuracy._update_count)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            found = self.answers(batch)
            if kind == "no loss":
                return found
            self.accuracy(found["preds"], found["target"])
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            return {**found, "loss": nn.functional.cross_entropy(found["preds"], found["target"])}

    return Classifier()


def without_statistics() -> nn.Module:
    """The answers for a row do not depend on the other rows."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(
    folder: Path,
    objective: Any,
    kind: str = "dict",
    more: Any = (),
    batch_size: int = 16,
    dropout: float = 0.0,
    plain: bool = False,
    **options: Any,
) -> Any:
    seen, own = Recorder(), module(kind, dropout, plain)
    options.setdefault("max_epochs", 2)
    host = lightning_trainer(folder, strategy=ZOStrategy(eps=0.1), callbacks=[objective, *more, seen], **options)
    host.fit(own, loader(batch_size))
    return own, seen, host


def test_lightning_makes_the_engines_steps_with_and_without_a_loss(tmp_path: Path) -> None:
    whole, seen, _ = fit(tmp_path, MetricObjective(MulticlassF1Score(**F1)))
    bare, bare_seen, _ = fit(tmp_path, MetricObjective(MulticlassF1Score(**F1)), "no loss")
    method, method_seen, _ = fit(tmp_path, MetricObjective(MulticlassF1Score(**F1), source="answers"))
    called, called_seen, _ = fit(tmp_path, MetricObjective(MulticlassF1Score(**F1), source=lambda own, batch: own.answers(batch)))
    own = module()
    optimizer, values = ZOOptimizer(own, lr=0.01, eps=0.1, objective=Score(MulticlassF1Score(**F1))), []
    own.net.train()
    for _ in range(2):
        for batch in loader(16):
            optimizer.step(lambda batch=batch: own.answers(batch))
            values.append(optimizer.report.values)
    assert len({value for row in values for value in row}) > 2
    assert seen.values == bare_seen.values == method_seen.values == called_seen.values == values
    assert all(same(state(own.net), state(one.net)) for one in (whole, bare, method, called))
    assert whole.calls == 8
    assert method.calls == called.calls == 0  # nothing of the training step was needed


def test_logged_metrics_are_counted_once_a_batch_and_the_metric_is_charted(tmp_path: Path) -> None:
    own, seen, _ = fit(
        tmp_path, MetricObjective(MulticlassF1Score(**F1)), logger=lightning().loggers.CSVLogger(tmp_path), log_every_n_steps=1
    )
    assert own.counts == [4, 4]
    written = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "zo/objective" in written.splitlines()[0]
    shown = [float(row["zo/objective"]) for row in csv.DictReader(written.splitlines()) if row.get("zo/objective")]
    assert shown == pytest.approx([-sum(row) / 2 for row in seen.values])


def test_accumulated_f1_in_lightning_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    whole, seen, _ = fit(tmp_path, MetricObjective(MulticlassF1Score(**F1)), "no loss", plain=True)
    parts, parts_seen, _ = fit(
        tmp_path, MetricObjective(MulticlassF1Score(**F1)), "no loss", batch_size=4, accumulate_grad_batches=4, plain=True
    )
    assert len(seen.values) == 8
    assert seen.values == parts_seen.values
    assert all(float((p - q).abs().max()) < 1e-6 for p, q in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


@pytest.mark.parametrize("logged", [False, True])
def test_a_lightning_run_that_is_killed_goes_on(logged: bool, tmp_path: Path) -> None:
    make = lambda: MetricObjective(MulticlassF1Score(**F1))  # noqa: E731
    kind = "dict" if logged else "no loss"
    whole, _, _ = fit(tmp_path / "whole", make(), kind, [TrajectoryLog()], dropout=0.1)
    with pytest.raises(CutError):
        fit(tmp_path / "cut", make(), kind, [TrajectoryLog(), Scissors(5)], dropout=0.1)
    again, _, _ = fit(tmp_path / "cut", make(), kind, [TrajectoryLog()], dropout=0.1)
    assert same(state(whole.net), state(again.net))


def test_what_a_run_did_not_log_is_not_counted_in_the_next(tmp_path: Path) -> None:
    objective = MetricObjective(MulticlassF1Score(**F1))
    hf(tmp_path, objective, max_steps=3, logging_steps=2)[0].train()
    again, seen = hf(tmp_path, objective, max_steps=2, logging_steps=2)
    again.train()
    assert losses(again, "zo/objective") == pytest.approx([sum(report.score for report in seen.reports) / 2])
