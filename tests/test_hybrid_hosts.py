"""backprop= under Lightning and Hugging Face: the engine's steps, resumed bit for bit, with accumulation, schedules, LoRA and bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_tools
import pytest
import torch
from hf_tools import bert
from lightning_models import HOST_WARNINGS, NAMES, lit, loader, loss_of, net, same, state, trainer, wrapped
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import MetricObjective, TrajectoryLog, WeightOffload
from zo_lightning.engine import Backprop, OneSided
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
HEAD = Backprop("3.*", lr=1e-2)
CLASSIFIER = Backprop("classifier*", lr=1e-2)


# ---- Lightning


@pytest.mark.parametrize("name", NAMES)
def test_lightning_makes_the_steps_of_the_plain_loop_and_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    model, data = net(), list(loader())
    optimizer = ZOOptimizer(model, lr=1e-3, backprop=HEAD)
    for step in range(10):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    for path, steps in ((None, 10), (None, 4), (tmp_path / "4.ckpt", 10)):
        module = lit(name)()
        host = trainer(tmp_path, name, strategy=ZOStrategy(lr=1e-3, backprop=HEAD), max_steps=steps)
        host.fit(module, loader(), ckpt_path=path)
        if steps == 4:
            host.save_checkpoint(tmp_path / "4.ckpt")
        else:
            assert same(state(module.net), state(model))


def test_lightning_accumulates_and_logs_a_loss_without_its_graph(tmp_path: Path) -> None:
    ends = []
    for size, pieces in ((16, 1), (4, 4)):
        seen: list[Tensor] = []

        class Module(lit()):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int, seen: list[Tensor] = seen) -> Any:
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss, on_epoch=True)
                return {"loss": loss, "kept": loss * 2}

            def on_train_batch_end(self, outputs: Any, *args: Any, seen: list[Tensor] = seen) -> None:
                seen.extend([outputs["loss"], outputs["kept"]])

        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        model.load_state_dict({key: torch.linspace(-1, 1, value.numel()).view_as(value) for key, value in model.state_dict().items()})
        module = Module(model)
        strategy = ZOStrategy(lr=1e-3, backprop=HEAD)
        trainer(tmp_path, strategy=strategy, max_steps=4, accumulate_grad_batches=pieces).fit(module, loader(size, dtype=torch.float64))
        assert seen
        assert not any(tensor.requires_grad for tensor in seen)
        ends.append(state(module.net))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-11


@pytest.mark.parametrize("lr", [None, 1e-3])
def test_lightnings_schedulers_scale_both_learning_rates(lr: float | None, tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    model, data = net(), list(loader())
    engine = ZOOptimizer(model, lr=1e-3, backprop=HEAD)
    scheduler = torch.optim.lr_scheduler.StepLR(engine, 1, 0.5)
    for step in range(4):
        engine.step(lambda step=step: loss_of(model, data[step]))
        scheduler.step()
    module = lit()(configure=configure)
    trainer(tmp_path, strategy=ZOStrategy(lr=lr, backprop=HEAD), max_steps=4).fit(module, loader())
    assert same(state(module.net), state(model))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightnings_precision(precision: str, tmp_path: Path) -> None:
    ends = []
    for kind in ("32-true", precision):
        module = lit()(net(dropout=0.0))
        strategy = ZOStrategy(lr=0.0, backprop=Backprop("3.*", lr=3e-3, weight_decay=0.0), safeguard=None)
        trainer(tmp_path, strategy=strategy, max_steps=60, precision=kind).fit(module, loader())
        ends.append(module.net[3].weight.detach().float() - net()[3].weight.detach())
    assert torch.nn.functional.cosine_similarity(ends[0].flatten(), ends[1].flatten(), dim=0) > 0.98
    assert float(ends[1].norm() / ends[0].norm()) == pytest.approx(1.0, abs=0.1)


def test_lightning_says_what_does_not_go_together(tmp_path: Path) -> None:
    strategy = ZOStrategy(lr=1e-3, backprop="head*")
    with pytest.raises(ValueError, match=r"'head\*' fits no parameter"):
        trainer(tmp_path, strategy=strategy, max_steps=1).fit(lit()(), loader())
    for callback, said in ((TrajectoryLog(tmp_path), "those of backprop= are gradients"), (WeightOffload(), "a graph would keep weights")):
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, backprop="3.*"), max_steps=1, callbacks=[callback]).fit(lit()(), loader())


# ---- Hugging Face


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_hugging_face_goes_on_from_a_checkpoint(dropout: float, tmp_path: Path) -> None:
    def run(**given: Any) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "gradient_accumulation_steps": 2}
        saving |= {"lr_scheduler_type": "linear", "per_device_train_batch_size": 2}
        host = hf_tools.trainer(tmp_path, bert(dropout=dropout), zo_backprop=CLASSIFIER, zo_lr=1e-3, **saving)
        host.train(**given)
        return host

    whole = run()
    rest = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert hf_tools.same(hf_tools.weights(rest.model), hf_tools.weights(whole.model))
    assert hf_tools.losses(whole, "zo/projected_grad") == hf_tools.losses(rest, "zo/projected_grad")
    assert all(parameter.grad is None and parameter.requires_grad for parameter in whole.model.parameters())


@pytest.mark.parametrize("kind", ["linear", "constant_with_warmup"])
def test_hugging_face_makes_the_engines_steps(kind: str, tmp_path: Path) -> None:
    model, rows = bert(dropout=0.0).double(), hf_tools.texts(32)
    batches = [{key: torch.tensor([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in range(0, 32, 8)]
    optimizer = ZOOptimizer(model, lr=1e-3, backprop=CLASSIFIER)
    scale = (lambda step: 1 - step / 4) if kind == "linear" else (lambda step: min(1.0, step / 2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for batch in batches:
        optimizer.step(lambda batch=batch: model(**batch).loss)
        scheduler.step()
    host = hf_tools.trainer(
        tmp_path,
        bert(dropout=0.0).double(),
        zo_backprop=CLASSIFIER,
        zo_lr=1e-3,
        lr_scheduler_type=kind,
        warmup_steps=2 * (kind != "linear"),
    )
    host.train()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), host.model.parameters(), strict=True))


@pytest.mark.parametrize("make", [bert, hf_tools.llama])
def test_hugging_face_accumulates(make: Any, tmp_path: Path) -> None:
    ends = []
    for size, pieces in ((8, 1), (2, 4)):
        data = hf_tools.texts() if make is bert else hf_tools.tokens()
        model = bert(dropout=0.0, dtype=torch.float64) if make is bert else hf_tools.llama(dtype=torch.float64)
        patterns = "classifier*" if make is bert else "*layers.1.* *norm.weight"
        given = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces}
        given |= {} if make is bert else {"compute_loss_func": hf_tools.per_token}
        host = hf_tools.trainer(tmp_path, model, data=data, zo_backprop=Backprop(patterns, lr=1e-2), **given)
        host.train()
        ends.append(hf_tools.weights(host.model))
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-7


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_with_a_classifier_that_is_trained_whole(bf16: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = bert(dropout=0.0, dtype=torch.bfloat16 if bf16 else torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    before = hf_tools.weights(model)
    host = hf_tools.trainer(tmp_path, model, zo_backprop="classifier*", zo_backprop_lr=1e-2, bf16=bf16)
    host.train()
    assert sorted(p.name for p in host.zo_optimizer.tail.parameters) == [
        f"classifier.modules_to_save.default.{kind}" for kind in ("bias", "weight")
    ]
    assert all("lora_" in p.name for p in host.zo_optimizer.residency.trained)
    assert host.zo_optimizer.eps == 1e-2  # LoRA's
    moved = {name for name, value in hf_tools.weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lightning_and_hugging_face_train_lora_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def model() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(bert(dropout=0.0), peft.LoraConfig(r=2, task_type="SEQ_CLS"))

    host = hf_tools.trainer(tmp_path, model(), zo_backprop=CLASSIFIER, zo_lr=1e-3)
    host.train()
    rows = hf_tools.texts()
    batches = [{key: torch.tensor([row[key] for row in rows[i : i + 8]]) for key in rows[0]} for i in range(0, 32, 8)]
    module = wrapped(model())
    trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, backprop=CLASSIFIER), max_steps=4).fit(
        module,
        torch.utils.data.DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
    )
    for one, other in zip(host.model.parameters(), module.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_metric_is_the_objective_of_the_front(tmp_path: Path) -> None:
    model = bert(dropout=0.0)
    before = hf_tools.weights(model)
    given = {"zo_eps": 0.1, "learning_rate": 0.1, "callbacks": [MetricObjective(MulticlassF1Score(2))]}
    host = hf_tools.trainer(tmp_path, model, zo_backprop=CLASSIFIER, **given)
    host.train()
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    assert host.zo_optimizer.report.score is not None


def test_the_command_line(tmp_path: Path) -> None:
    args = hf_tools.arguments(tmp_path, ZOConfig, zo_backprop="classifier* *pooler*", zo_backprop_lr=1e-3, zo_estimator="one_sided")
    host = hf_tools.trainer(tmp_path, args=args, kind=ZOTrainer)
    optimizer = host.create_optimizer()
    assert optimizer.tail.backprop == Backprop(["classifier*", "*pooler*"], lr=1e-3)
    assert len(optimizer.tail.parameters) == 4
    assert isinstance(optimizer.estimator, OneSided)
    args = hf_tools.arguments(tmp_path, optim_args="backprop=classifier*,backprop_lr=1e-2")
    assert hf_tools.trainer(tmp_path, args=args).create_optimizer().tail.backprop == CLASSIFIER
    for given in ({"zo_backprop_lr": 1e-3}, {"zo_backprop_lr": 1e-3, "zo_backprop": CLASSIFIER}):
        with pytest.raises(ValueError, match=r"zo_backprop_lr=0.001 does nothing beside zo_backprop="):
            hf_tools.trainer(tmp_path, **given)
    with pytest.raises(ValueError, match=r"Invalid lr of Backprop: -1.0"):
        hf_tools.arguments(tmp_path, ZOConfig, zo_backprop="classifier*", zo_backprop_lr=-1.0)


def test_the_step_log_is_refused_before_a_step(tmp_path: Path) -> None:
    host = hf_tools.trainer(tmp_path, zo_backprop=CLASSIFIER, callbacks=[TrajectoryLog(tmp_path / "log")])
    before = hf_tools.weights(host.model)
    with pytest.raises(ValueError, match="those of backprop= are gradients"):
        host.train()
    assert hf_tools.same(hf_tools.weights(host.model), before)
