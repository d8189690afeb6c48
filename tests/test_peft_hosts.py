"""Adapters of every kind under both hosts: the steps of the engine alone, bit for bit, with masks, accumulation and resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine_models import same, snapshot
from hf_tools import StopAt, arguments
from lightning_models import lightning, wrapped
from peft_tools import IDS, KINDS, adapted, base, batch_of, logits, loss_of
from torch.utils.data import DataLoader

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import PrefixInit, SparseMask, TrajectoryLog, WeightOffload
from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.messages import reset
from zo_lightning.engine.residency import Offloaded
from zo_lightning.hf_integration import ZOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
]
STEPS = 4
ROWS = [{name: tensor[i % 4] for name, tensor in batch_of("llama").items()} for i in range(8 * STEPS)]


def batch(step: int, rows: int = 4) -> dict[str, torch.Tensor]:
    some = ROWS[rows * step : rows * (step + 1)]
    return {name: torch.stack([row[name] for row in some]) for name in some[0]}


def by_engine(model: Any, **more: Any) -> dict[str, torch.Tensor]:
    optimizer = ZOOptimizer(model, lr=1e-3)
    for step in range(STEPS):
        given = {**batch(step), **more}
        optimizer.step(lambda given=given: model(**given).loss)  # type: ignore[misc]
    return snapshot(model)


def trainer(model: Any, folder: Path, **given: Any) -> ZOTrainer:
    more = {name: given.pop(name) for name in ("peft_config", "callbacks", "zo_mask") if name in given}
    options = {"per_device_train_batch_size": 4, "max_steps": STEPS, **given}
    return ZOTrainer(model, arguments(folder, **options), train_dataset=ROWS, **more)


def by_lightning(model: Any, folder: Path, **given: Any) -> dict[str, torch.Tensor]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = (
        lightning()
        .Trainer(strategy=ZOStrategy(), max_steps=STEPS, default_root_dir=folder, accelerator="cpu", devices=1, **{**quiet, **given})
        .fit
    )
    model.train()
    fit(wrapped(model), DataLoader(ROWS, 4))  # type: ignore[arg-type]
    return snapshot(model)


@pytest.mark.filterwarnings("ignore:lr=.*:zo_lightning.engine.messages.ZOWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_both_hosts_make_the_steps_of_the_engine(kind: str, tmp_path: Path) -> None:
    expected = by_engine(adapted("llama", kind).train())
    assert same(by_lightning(adapted("llama", kind), tmp_path), expected)
    if kind in ("prompt", "p-tuning"):  # the Trainer counts labels without the one that virtual tokens predict, and divides by that
        expected = by_engine(adapted("llama", kind).train(), num_items_in_batch=torch.tensor(4 * (IDS.shape[1] - 1)))
    hosted = trainer(adapted("llama", kind), tmp_path)
    hosted.train()
    assert same(snapshot(hosted.model), expected)


@pytest.mark.filterwarnings("ignore:lr=.*:zo_lightning.engine.messages.ZOWarning")
def test_a_prefix_begins_as_tokens_under_both_hosts(tmp_path: Path) -> None:
    begun = adapted("llama", "prefix")
    PrefixInit().initialize(begun)
    expected = by_engine(begun.train())
    hosted = trainer(adapted("llama", "prefix"), tmp_path, callbacks=[PrefixInit()])
    hosted.train()
    assert same(snapshot(hosted.model), expected)
    assert same(by_lightning(adapted("llama", "prefix"), tmp_path, callbacks=[PrefixInit()]), expected)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no virtual tokens"):
        trainer(base("llama"), tmp_path, callbacks=[PrefixInit()]).train()


@pytest.mark.filterwarnings("ignore:lr=.*:zo_lightning.engine.messages.ZOWarning")
def test_a_prefix_of_a_streamed_base(tmp_path: Path) -> None:
    begun = adapted("llama", "prefix")
    PrefixInit().initialize(begun)
    expected = by_engine(begun.train())
    hosted = trainer(adapted("llama", "prefix"), tmp_path, callbacks=[PrefixInit(), WeightOffload(str(tmp_path / "tier"))])
    hosted.train()
    assert isinstance(hosted.zo_optimizer.residency, Offloaded)
    assert same(snapshot(hosted.model), expected)


@pytest.mark.parametrize("how", ["model", "model_init"])
def test_a_peft_config_makes_the_adapter(how: str, tmp_path: Path) -> None:
    config = KINDS["LoRA"]("llama")
    config.init_lora_weights = False

    def seeded() -> Any:
        torch.manual_seed(5)
        return base("llama")

    given = {"model": seeded()} if how == "model" else {"model_init": seeded}
    made = ZOTrainer(args=arguments(tmp_path, per_device_train_batch_size=4), train_dataset=ROWS, peft_config=config, **given)
    assert isinstance(made.model, peft.PeftModel)
    made.train()
    assert all("lora_" in name for name, weight in made.model.named_parameters() if weight.requires_grad)
    made.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "saved")
    assert same(snapshot(loaded), snapshot(made.model))
    assert torch.equal(logits(loaded.eval(), "llama"), logits(made.model.eval(), "llama"))
    assert not torch.equal(logits(base("llama"), "llama"), logits(loaded, "llama"))


def test_a_peft_config_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has adapters already \(default\)"):
        trainer(adapted("llama", "LoRA"), tmp_path, peft_config=KINDS["LoRA"]("llama"))
    with pytest.raises(ValueError, match="nothing_like_it"):
        trainer(base("llama"), tmp_path, peft_config=peft.LoraConfig(target_modules=["nothing_like_it"]))


def test_adalora_needs_gradients() -> None:
    model = peft.get_peft_model(base("llama"), peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10))
    with pytest.raises(ValueError, match=r"AdaLoRA's, which allocates ranks by the gradients.*Use LoraConfig"):
        ZOOptimizer(model)


@pytest.mark.parametrize("kind", ["LoRA", "prefix"])
def test_gradient_checkpointing_is_off_and_said(kind: str, tmp_path: Path) -> None:
    reset()
    expected = by_engine(adapted("llama", kind).train())
    model = adapted("llama", kind)
    with pytest.warns(UserWarning, match="is turned off"):
        made = trainer(model, tmp_path, activation_checkpointing=True)
    made.train()
    assert same(snapshot(made.model), expected)


@pytest.mark.parametrize("kind", ["LoRA", "prefix"])
def test_scales_that_suit_what_is_trained(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reset()
    eps, lr = {"LoRA": (1e-2, 5e-5), "prefix": (1e-1, 1e-3)}[kind]
    with caplog.at_level(logging.INFO, "zo_lightning"):
        (group,) = ZOOptimizer(adapted("opt", kind)).param_groups
    assert (group["eps"], group["lr"]) == (eps, lr)
    name = "LoRA" if kind == "LoRA" else "prefix and prompt tuning"
    assert f"eps={eps:g}, lr={lr:g}: what suits {name} (MeZO)" in caplog.text
    (group,) = ZOOptimizer(adapted("opt", kind), lr=0.0, eps=1e-3).param_groups
    assert (group["eps"], group["lr"]) == (1e-3, 0.0)
    one, other = list(base("opt").parameters())[:2]
    groups = ZOOptimizer([{"params": [one]}, {"params": [other], "eps": 0.5}]).param_groups
    assert [group["eps"] for group in groups] == [1e-3, 0.5]
    made = trainer(adapted("opt", kind), tmp_path)
    made.create_optimizer()
    assert made.zo_optimizer.eps == eps
    assert made.zo_optimizer.param_groups[0]["lr"] == 1e-3


def test_the_noise_of_loras_a_is_a_tenth_where_eps_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """As with groups that say so: eps a tenth, lr a hundredth. Copies and the state of a run have it, too."""
    reset()

    def moved(build: Callable[[Any], ZOOptimizer]) -> dict[str, torch.Tensor]:
        model = adapted("llama", "LoRA")
        before = snapshot(model)
        optimizer = build(model)
        for _ in range(2):
            optimizer.step(loss_of(model, "llama"))
        return {name: tensor - before[name] for name, tensor in snapshot(model).items() if "lora_" in name}

    def in_groups(model: Any) -> ZOOptimizer:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        small, rest = ([p for name, p in named if ("lora_A" in name) is one] for one in (True, False))
        return ZOOptimizer([{"params": rest}, {"params": small, "eps": 1e-3, "lr": 1e-4}], lr=1e-2, eps=1e-2, module=model, weights="copy")

    with caplog.at_level(logging.INFO, "zo_lightning"):
        ours = moved(lambda model: ZOOptimizer(model, lr=1e-2, weights="copy"))
    assert "LoRA's A gets noise of a tenth of the size" in caplog.text
    copied = moved(copy_of)
    grouped, plain = moved(in_groups), moved(lambda model: ZOOptimizer(model, lr=1e-2, eps=1e-2, weights="copy"))
    for name, change in ours.items():
        torch.testing.assert_close(change, grouped[name], rtol=1e-3, atol=1e-7)
        assert torch.equal(change, copied[name])
    sizes = {part: max(float(c.abs().max()) for n, c in ours.items() if part in n) for part in ("lora_A", "lora_B")}
    assert sizes["lora_A"] == pytest.approx(0.1 * sizes["lora_B"], rel=0.02)
    assert max(float(change.abs().max()) for name, change in plain.items() if "lora_A" in name) > 5 * sizes["lora_A"]


def copy_of(model: Any) -> ZOOptimizer:
    """An optimizer whose attributes went through a pickle, on this model."""
    made = ZOOptimizer(model, lr=1e-2, weights="copy")
    made.__setstate__(made.__getstate__())
    return made


@pytest.mark.parametrize("kind", ["LoRA", "prefix", "IA3"])
@pytest.mark.parametrize("how", ["plain", "masked", "accumulated"])
def test_a_run_that_is_killed_goes_on(how: str, kind: str, tmp_path: Path) -> None:
    """The step log resumes it, bit for bit; a prefix that began as tokens does not begin again."""

    def run(folder: Path, steps: int = STEPS) -> Any:
        callbacks: list[Any] = [TrajectoryLog()]
        callbacks += [PrefixInit()] if kind == "prefix" else []
        callbacks += [SparseMask("small_weights", 0.5, refresh=2)] if how == "masked" else []
        more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} if how == "accumulated" else {}
        made = trainer(adapted("llama", kind), folder, callbacks=callbacks, save_strategy="no", **more)
        if steps < STEPS:
            made.add_callback(StopAt(steps))
        try:
            made.train()
        except InterruptedError:
            return None
        return snapshot(made.model)

    expected = run(tmp_path / "whole")
    assert run(tmp_path / "cut", 2) is None
    assert same(run(tmp_path / "cut"), expected)


def test_several_adapters_of_which_one_is_active() -> None:
    model = adapted("llama", "LoRA")
    model.add_adapter("other", KINDS["LoRA"]("llama"))
    model.set_adapter("other")
    model.train()
    before = snapshot(model)
    after = by_engine(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".other." in name and "lora_" in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_on_a_base_in_16_bits(dtype: torch.dtype) -> None:
    model = peft.get_peft_model(base("llama").to(dtype), KINDS["LoRA"]("llama")).train()
    kept = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in kept.values()} == {dtype}
    before = snapshot(model)
    after = by_engine(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weight, after[name]) for name, weight in kept.items())


def test_merging_inside_the_closure_is_what_the_closure_sees() -> None:
    """Between steps nothing is perturbed, so a merge is of the weights of the last step."""
    model = adapted("llama", "LoRA")
    by_engine(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
