"""Update rules under Lightning and Hugging Face: the engine's steps, resumed bit for bit, with LoRA, bfloat16 and step logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_tools
import pytest
import torch
from hf_tools import bert
from lightning_models import HOST_WARNINGS, Recorder, lit, loader, loss_of, net, same, state, trainer

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.engine import Adam, HiZOO, LowRank, Momentum, OneSided, TorchOptimizer, UpdateRule
from zo_lightning.engine.trajectory import load_base, read_log, verify
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
RULES: dict[str, str | UpdateRule] = {
    "sign": "sign",
    "momentum": Momentum(0.8, window=3),
    "adam": "adam",
    "RMSprop": TorchOptimizer("RMSprop", alpha=0.9),
    "hizoo": HiZOO(1e-2),
}
NOISE = {"hizoo": "gaussian", "momentum": "low_rank(rank=2, refresh=3)", "adam": "sphere"}
"""Of these rules; others have Rademacher noise."""


@pytest.mark.parametrize("name", RULES)
def test_lightning_makes_the_steps_of_the_plain_loop_and_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    model, data = net(), list(loader())
    optimizer = ZOOptimizer(model, lr=1e-3, update=RULES[name], noise=NOISE.get(name, "rademacher"))
    for step in range(10):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    for path, steps in ((None, 10), (None, 4), (tmp_path / "4.ckpt", 10)):
        module = lit()()
        host = trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, update=RULES[name], noise=NOISE.get(name, "rademacher")), max_steps=steps)
        host.fit(module, loader(), ckpt_path=path)
        if steps == 4:
            host.save_checkpoint(tmp_path / "4.ckpt")
        else:
            assert same(state(module.net), state(model))


@pytest.mark.parametrize("name", RULES)
def test_hugging_face_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    def run(**given: Any) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "gradient_accumulation_steps": 2}
        host = hf_tools.trainer(tmp_path, bert(), zo_update=RULES[name], zo_noise=NOISE.get(name, "rademacher"), zo_lr=1e-3, **saving)
        host.train(**given)
        return host

    whole = run()
    rest = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert hf_tools.same(hf_tools.weights(rest.model), hf_tools.weights(whole.model))
    assert hf_tools.losses(whole, "zo/projected_grad") == hf_tools.losses(rest, "zo/projected_grad")


def test_hugging_face_makes_the_engines_steps(tmp_path: Path) -> None:
    model, batch = bert(dropout=0.0), hf_tools.texts(8)
    fields = {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in batch[0]}
    optimizer = ZOOptimizer(model, lr=1e-3, update="adam")
    for _ in range(4):
        optimizer.step(lambda: model(**fields).loss)
    host = hf_tools.trainer(tmp_path, bert(dropout=0.0), data=batch, args=hf_tools.arguments(tmp_path, ZOConfig, zo_update="adam"))
    host.train()
    assert isinstance(host.zo_optimizer.rule, Adam)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), host.model.parameters(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_by_adam_with_a_step_log(bf16: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(bert(dropout=0.0, dtype=torch.bfloat16 if bf16 else torch.float32), peft.LoraConfig(r=2))
    host = hf_tools.trainer(tmp_path, model, zo_update="adam", zo_lr=1e-3, bf16=bf16, callbacks=[TrajectoryLog(tmp_path / "log")])
    host.train()
    log = read_log(tmp_path / "log" / "trajectory.zolog")
    assert log.segments[0].rule["name"] == "adam"
    assert verify(load_base(tmp_path / "log" / str(log.segments[0].base)), log).ok
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_wrong_names_are_said_where_they_are_given(tmp_path: Path) -> None:
    for make in (lambda: ZOStrategy(update="adagrad"), lambda: hf_tools.arguments(tmp_path, ZOConfig, zo_update="adagrad")):
        with pytest.raises(ValueError, match=r"update='adagrad' is not known. Use one of 'sgd', 'sign', 'momentum', 'adam'"):
            make()
    args = hf_tools.arguments(tmp_path, optim_args="noise=low_rank(rank=3, refresh=7),eps=1e-2")
    assert hf_tools.trainer(tmp_path, args=args, kind=ZOTrainer).create_optimizer().noise == LowRank(3, refresh=7)
    args = hf_tools.arguments(tmp_path, optim_args="update=momentum,eps=1e-2")
    assert isinstance(hf_tools.trainer(tmp_path, args=args, kind=ZOTrainer).create_optimizer().rule, Momentum)


def test_callbacks_report_as_before(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, update="adam", clip=0.5), max_steps=3, callbacks=[recorder]).fit(lit()(), loader())
    assert all(abs(report.projected_grad) <= 0.5 for report in recorder.reports)


def test_objects_among_the_arguments_are_written_as_text(tmp_path: Path) -> None:
    """Loggers write the arguments as JSON at the beginning of a run, and trainers save them."""
    given = {"zo_update": TorchOptimizer("RMSprop", alpha=0.9), "zo_estimator": OneSided(2), "zo_noise": LowRank(3)}
    args = hf_tools.arguments(tmp_path, ZOConfig, report_to="tensorboard", **given)
    host = hf_tools.trainer(tmp_path, bert(), args=args)
    host.train()
    host.save_model(str(tmp_path / "saved"))
    assert json.loads(args.to_json_string())["zo_noise"] == "LowRank(rank=3, refresh=50, orthogonal=False)"
    assert args.zo_noise == LowRank(3)
    assert torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False).zo_update == given["zo_update"]
