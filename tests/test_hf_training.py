"""The Hugging Face training step: equal to the plain engine loop, host features kept, nothing counted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import (
    Regression,
    arguments,
    bert,
    llama,
    losses,
    numbers,
    per_token,
    same,
    texts,
    tokens,
    trainer,
    weights,
)
from transformers import Trainer, default_data_collator

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.hf_integration import ZOConfig, ZOTrainer, ZOTrainerMixin


def engine_loop(model: Any, data: list[dict[str, Any]], steps: int, **options: Any) -> tuple[list[float], ZOOptimizer]:
    """The plain loop over sequential batches of 8, as the engine alone would run it."""
    optimizer = ZOOptimizer(model, lr=1e-3, **options)
    model.train()
    values = []
    for step in range(steps):
        start = 8 * step % len(data)
        batch = default_data_collator(data[start : start + 8])
        loss = optimizer.estimate(lambda batch=batch: model(**batch)["loss"]).loss  # a host has no fused step()
        optimizer.apply()
        values.append(float(loss.to(torch.float32)))
    return values, optimizer


@pytest.mark.parametrize("options", [{}, {"noise": "gaussian", "seed": 3}, {"weights": "inplace"}, {"dropout": False}])
def test_fifty_steps_are_bit_equal_with_the_engine(options: dict[str, Any], tmp_path: Path) -> None:
    plain = bert()
    expected, _ = engine_loop(plain, texts(), 50, **options)
    host = trainer(tmp_path, max_steps=50, **{f"zo_{name}": value for name, value in options.items()})
    host.train()
    assert losses(host) == pytest.approx(expected, rel=0, abs=0)
    assert same(weights(host.model), weights(plain))


def test_several_queries_are_bit_equal_with_the_engine(tmp_path: Path) -> None:
    plain = llama()
    expected, reference = engine_loop(plain, tokens(), 6, estimator=spsa(3))
    host = trainer(tmp_path, llama(), data=tokens(), kind=ZOTrainer, zo_queries=3, max_steps=6)
    host.train()
    assert same(weights(host.model), weights(plain))
    assert losses(host) == pytest.approx(expected, rel=1e-6)  # the host's loss is a sum over tokens, divided
    assert host.zo_optimizer.forward_passes == reference.forward_passes == 36


def spsa(queries: int) -> Any:
    from zo_lightning.engine import SPSA

    return SPSA(queries=queries)


def test_learning_rate_schedule_and_decay_groups_are_the_hosts(tmp_path: Path) -> None:
    host = trainer(tmp_path, weight_decay=0.1, lr_scheduler_type="linear", max_steps=4, learning_rate=4e-3)
    with pytest.warns(ZOWarning, match="weight_decay=0.1"):
        host.train()
    decayed, spared = host.zo_optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all([decayed["params"], spared["params"]])
    assert losses(host, "learning_rate") == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])


def test_zo_lr_and_zo_weight_decay_replace_the_hosts(tmp_path: Path) -> None:
    host = trainer(tmp_path, learning_rate=1.0, zo_lr=2e-3, weight_decay=0.5, zo_weight_decay=0.25)
    host.train()
    assert losses(host, "learning_rate") == [2e-3] * 4
    assert [group["weight_decay"] for group in host.zo_optimizer.param_groups] == [0.25, 0.0]


def frozen_statistics() -> Regression:
    """Regression in float64 whose BatchNorm does not look at the batch."""
    net = Regression(torch.float64)
    norm = net.net[1]
    norm.train = norm.eval = lambda *_: norm  # type: ignore[method-assign,assignment]
    norm.training = False
    return net


ACCUMULATED = {
    "classes": (lambda: bert(dropout=0.0, dtype=torch.float64), texts, {}, 1e-9),
    "plain module": (frozen_statistics, numbers, {}, 1e-9),
    "tokens, own loss": (lambda: llama(dtype=torch.float64), tokens, {"compute_loss_func": per_token}, 1e-9),
    # transformers computes these in float32 whatever the model's dtype; a wrong scale would show at 1e-3
    "tokens": (lambda: llama(dtype=torch.float64), tokens, {}, 3e-6),
    "classes, smoothed": (
        lambda: bert(dropout=0.0, dtype=torch.float64),
        texts,
        {"label_smoothing_factor": 0.1},
        3e-6,
    ),
    "tokens, smoothed": (lambda: llama(dtype=torch.float64), tokens, {"label_smoothing_factor": 0.1}, 3e-6),
}


@pytest.mark.parametrize("case", ACCUMULATED)
def test_accumulation_equals_a_large_batch(case: str, tmp_path: Path) -> None:
    """4 x 2 = 1 x 8, for models whose loss ignores num_items_in_batch too; a window's noise is one z."""
    build, data, given, tolerance = ACCUMULATED[case]
    runs = []
    for size, times in ((8, 1), (2, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 6}
        host = trainer(tmp_path, build(), data=data(), **batches, **given)
        host.train()
        assert host.zo_optimizer.steps == 6
        runs.append(host)
    large, small = runs
    assert losses(large) == pytest.approx(losses(small), rel=1e-6)
    moved = 0.0
    for name, value in weights(large.model).items():
        torch.testing.assert_close(weights(small.model)[name], value, rtol=0, atol=tolerance)
        moved = max(moved, float((value - build().state_dict()[name]).abs().max()))
    assert moved > 1e-4


def test_a_loss_scale_that_a_subclass_states_is_kept(tmp_path: Path) -> None:
    class Stated(ZOTrainer):
        loss_is_scaled_for_ga = True

    host = trainer(tmp_path, kind=Stated, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=2)
    host.train()
    divided = trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=2)
    divided.train()
    assert losses(host)[0] == pytest.approx(2 * losses(divided)[0], rel=1e-6)


def test_the_scale_probe_leaves_no_trace(tmp_path: Path) -> None:
    calls = []

    class Counting(ZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.model.training)
            self.seen = getattr(self, "seen", 0) + 1
            return super().compute_loss(*args, **kwargs)

    net = Regression()
    host = trainer(tmp_path, net, Counting, numbers(), gradient_accumulation_steps=2, max_steps=2)
    host.train()
    assert calls.count(False) == 0  # Regression takes no **kwargs: the host already knows that it is not scaled
    assert host.seen == 4
    calls.clear()
    host = trainer(tmp_path, bert(), Counting, gradient_accumulation_steps=2, max_steps=2)
    host.train()
    assert calls == [False, False] + [True] * 8
    assert host.seen == 4
    assert host.zo_optimizer.forward_passes == 8


def test_label_smoothing_and_compute_loss_func(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    plain.train()
    smoothed = trainer(tmp_path, label_smoothing_factor=0.3)
    smoothed.train()

    def tripled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return 3 * torch.nn.functional.cross_entropy(outputs.logits, labels)

    own = trainer(tmp_path, compute_loss_func=tripled)
    own.train()
    assert losses(smoothed)[0] != losses(plain)[0]
    assert losses(own)[0] == pytest.approx(3 * losses(plain)[0], rel=1e-6)
    assert own.zo_optimizer.report.projected_grad != 0


def test_bf16_has_one_autocast_region_per_forward(tmp_path: Path) -> None:
    """Two forwards inside one region would read one cached cast of the weights: equal losses, gradient 0."""
    seen: list[torch.dtype] = []
    model = bert()
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    host = trainer(tmp_path, model, bf16=True, zo_eps=1e-1)
    host.train()
    assert set(seen) == {torch.bfloat16}
    assert host.zo_optimizer.zero_difference_steps == 0
    assert all(value != 0 for value in losses(host, "zo/projected_grad"))


def test_fp16_drops_the_scaler(tmp_path: Path) -> None:
    class OnGpu:
        """Stands for a GPU, where accelerate makes a scaler and clipping unscales."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
            self.accelerator.scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
            self.accelerator.native_amp = True  # type: ignore[attr-defined]

    kind = type("GpuTrainer", (ZOTrainerMixin, OnGpu, Trainer), {})
    with pytest.warns(ZOWarning, match="fp16.*scaler is off"):
        host = trainer(tmp_path, kind=kind, fp16=True, save_strategy="steps", save_steps=2, max_steps=4)
    host.train()
    assert host.zo_optimizer.steps == 4
    assert not host.accelerator.scaler.is_enabled()
    before = weights(host.model)
    again = trainer(tmp_path, kind=kind, fp16=True, save_strategy="steps", save_steps=2, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(again.model), before)


def test_neftune_noise_is_common_to_both_sides(tmp_path: Path) -> None:
    quiet = trainer(tmp_path, llama(), data=tokens(), zo_eps=1e-6, max_steps=1)
    quiet.train()
    noisy = trainer(tmp_path, llama(), data=tokens(), zo_eps=1e-6, max_steps=1, neftune_noise_alpha=5.0)
    noisy.train()
    plus, minus = noisy.zo_optimizer.report.values
    assert plus != quiet.zo_optimizer.report.values[0]
    assert abs(plus - minus) < 1e-4


def test_logs_have_no_grad_norm_and_python_floats(tmp_path: Path) -> None:
    host = trainer(tmp_path, logging_steps=2)
    host.train()
    training = [entry for entry in host.state.log_history if "loss" in entry]
    assert len(training) == 2
    for entry in host.state.log_history:
        assert "grad_norm" not in entry
        assert all(type(value) in (int, float) for value in entry.values())
    assert training[-1]["zo/projected_grad"] == host.zo_optimizer.report.projected_grad
    assert "zo/projected_grad" not in host.state.log_history[-1]


def test_the_logged_loss_is_the_mean_over_the_points(tmp_path: Path) -> None:
    host = trainer(tmp_path, zo_eps=1e-1, max_steps=1)
    host.train()
    plus, minus = host.zo_optimizer.report.values
    assert plus != minus
    assert losses(host) == pytest.approx([(plus + minus) / 2], rel=1e-6)


def test_buffers_advance_once_a_step(tmp_path: Path) -> None:
    host = trainer(tmp_path, Regression(), data=numbers(), zo_queries=2)
    host.train()
    assert int(host.model.net[1].num_batches_tracked) == 4


def test_what_a_subclass_counts_and_logs_is_counted_once(tmp_path: Path) -> None:
    class Counting(ZOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.calls, self.history, self.nested = 0, [], {"train": {"n": []}}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.history.append(self.calls)
            self.nested["train"]["n"].append(self.calls)
            self.nested["train"]["total"] = [self.calls]
            self.log({"mine": float(self.calls)})
            return super().compute_loss(*args, **kwargs)

    host = trainer(tmp_path, kind=Counting, zo_queries=2)
    host.train()
    assert host.calls == 4
    assert host.history == host.nested["train"]["n"] == [1, 2, 3, 4]
    assert host.nested["train"]["total"] == [4]
    assert losses(host, "mine") == [1.0, 2.0, 3.0, 4.0]


def test_a_host_step_that_consumes_its_inputs(tmp_path: Path) -> None:
    class Consuming(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
            inputs.pop("attention_mask")  # a second time it would not be there
            return super().training_step(model, inputs, *args)

    host = trainer(tmp_path, kind=type("ZOConsuming", (ZOTrainerMixin, Consuming), {}))
    host.train()
    assert host.zo_optimizer.steps == 4


def test_input_tokens_are_counted_once(tmp_path: Path) -> None:
    host = trainer(tmp_path, include_num_input_tokens_seen="all")
    host.train()
    assert host.state.num_input_tokens_seen == 4 * 8 * 8


def test_dropout_false_survives_the_hosts_model_train(tmp_path: Path) -> None:
    """training_step calls model.train() in every evaluation; the Dropout modules stay off all the same."""
    host = trainer(tmp_path, bert(dropout=0.5), zo_dropout=False, max_steps=1, zo_eps=1e-6)
    quiet = trainer(tmp_path, bert(dropout=0.0), max_steps=1, zo_eps=1e-6)
    host.model.bert.encoder.layer[0].attention.self.dropout_prob = 0.0
    for layer in host.model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0  # read as a number by the attention function, not called
    host.train()
    quiet.train()
    assert losses(host) == losses(quiet)
    assert host.model.dropout.training


def test_config_defaults_equal_the_engines(tmp_path: Path) -> None:
    config = arguments(tmp_path, ZOConfig)
    reference = ZOOptimizer(bert())
    host = ZOTrainer(bert(), config, train_dataset=texts())
    built = host.create_optimizer()
    assert built.defaults["eps"] == reference.defaults["eps"]
    assert config.zo_eps is None
