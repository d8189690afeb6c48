"""Quantized models under Lightning and Hugging Face: the steps of the engine, checkpoints that hold what is trained, killed runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from engine_models import same
from hf_tools import StopAt, arguments
from lightning_models import lightning, wrapped
from peft_tools import IDS, base, logits
from quantized_tools import CONFIGS, integers, quantized, scales
from ranks import free_port
from torch.utils.data import DataLoader

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import SparseMask, TrajectoryLog
from zo_lightning.engine import ZOOptimizer
from zo_lightning.hf_integration import ZOTrainer
from zo_lightning.quantized import load_scales, release_scales, train_scales

pytestmark = [
    pytest.mark.filterwarnings("ignore:lr=.*:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings("ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
]
STEPS = 4
ROWS = [{"input_ids": row, "labels": row} for row in torch.cat([IDS, IDS.flip(1)])]


def made(bits: str) -> Any:
    model = quantized("llama", bits)
    train_scales(model)
    return model.train()


def by_engine(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    optimizer = ZOOptimizer(model, **{"lr": 1e-2, **options})
    batches = [{key: torch.stack([row[key] for row in ROWS[at : at + 4]]) for key in ROWS[0]} for at in (0, 4)]
    for step in range(STEPS):
        optimizer.step(lambda step=step: model(**batches[step % 2]).loss)  # type: ignore[misc]
    return scales(model)


def trainer(model: Any, folder: Path, callbacks: Any = (), **given: Any) -> ZOTrainer:
    options = {"per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2, **given}
    return ZOTrainer(model, arguments(folder, **options), train_dataset=ROWS, callbacks=list(callbacks))


def fit(model: Any, folder: Path, ckpt_path: Any = None, **given: Any) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    host = lightning()
    saving = host.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    given["callbacks"] = [saving, *given.get("callbacks", ())]
    run = host.Trainer(strategy=ZOStrategy(), max_steps=STEPS, accelerator="cpu", devices=1, **quiet, **given)
    run.fit(wrapped(model, lr=1e-2), DataLoader(ROWS, 4), ckpt_path=ckpt_path)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("bits", CONFIGS)
def test_both_hosts_make_the_steps_of_the_engine_and_resume(bits: str, tmp_path: Path) -> None:
    expected, kept = by_engine(made(bits)), integers(made(bits))
    hosted = made(bits)
    trainer(hosted, tmp_path / "hf", save_strategy="steps", save_steps=2).train()
    assert same(scales(hosted), expected)
    assert same(integers(hosted), kept)
    files = {path.name for path in (tmp_path / "hf" / "checkpoint-2").iterdir()}
    assert {"scales.safetensors", "config.json"} <= files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    again = made(bits)
    trainer(again, tmp_path / "hf").train(resume_from_checkpoint=str(tmp_path / "hf" / "checkpoint-2"))
    assert same(scales(again), expected)
    plain = quantized("llama", bits)
    load_scales(plain, tmp_path / "hf" / "checkpoint-4" / "scales.safetensors")
    assert torch.equal(logits(plain, "llama"), logits(hosted.eval(), "llama"))

    lightened = made(bits)
    fit(lightened, tmp_path / "pl")
    assert same(scales(lightened), expected)
    resumed = made(bits)
    fit(resumed, tmp_path / "pl", ckpt_path=str(tmp_path / "pl" / "step=2.ckpt"))
    assert same(scales(resumed), expected)


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    model = made("int4")
    run = ZOTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.5,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    other = quantized("llama", "int4")
    load_scales(other, Path(best) / "scales.safetensors")
    assert torch.equal(logits(other, "llama"), logits(model.eval(), "llama"))


@pytest.mark.parametrize("how", ["plain", "masked", "accumulated"])
def test_a_killed_run_goes_on_to_the_bit(how: str, tmp_path: Path) -> None:
    def run(folder: Path, stop: int = STEPS) -> Any:
        callbacks: list[Any] = [TrajectoryLog()]
        callbacks += [SparseMask("small_weights", 0.5, refresh=2)] if how == "masked" else []
        more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} if how == "accumulated" else {}
        made_one = made("int4")
        hosted = trainer(made_one, folder, callbacks, **more)
        if stop < STEPS:
            hosted.add_callback(StopAt(stop))
            with pytest.raises(InterruptedError):
                hosted.train()
            return None
        hosted.train()
        return scales(made_one)

    expected = run(tmp_path / "whole")
    run(tmp_path / "cut", 2)
    assert same(run(tmp_path / "cut"), expected)


def test_a_model_that_transformers_quantized(tmp_path: Path) -> None:
    """Whose Trainer takes it with adapters alone; with scales that are parameters it is trained, and saved by the package afterwards."""
    source = tmp_path / "source"
    base("llama").save_pretrained(source)
    config = transformers.TorchAoConfig(CONFIGS["int8"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(copy.copy(model), tmp_path / "a")
    assert train_scales(model)
    before = scales(model)
    run = trainer(model.train(), tmp_path / "b")
    assert model.is_quantized
    run.train()
    assert not any(torch.equal(before[name], value) for name, value in scales(model).items())
    expected = logits(model.eval(), "llama")
    release_scales(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(logits(loaded.eval(), "llama"), expected)


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
def test_adapters_beside_scales_are_saved_as_adapters(tmp_path: Path) -> None:
    model = peft.get_peft_model(quantized("llama", "int4"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    names = train_scales(model, also=["*lora*"])
    assert any("lora_B" in name for name in names)
    run = trainer(model, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "scales.safetensors"} <= files
    other = peft.get_peft_model(quantized("llama", "int4"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    load_scales(other, tmp_path / "saved" / "scales.safetensors")
    assert torch.equal(logits(other.eval(), "llama"), logits(run.model.eval(), "llama"))


class Plain(torch.nn.Module):
    """Not a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = quantized("llama", "int4")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}


def test_a_plain_module_is_saved_anew_each_time(tmp_path: Path) -> None:
    model = Plain()
    train_scales(model)
    run = trainer(model, tmp_path)
    run.save_model(str(tmp_path / "saved"))
    run.train()
    run.save_model(str(tmp_path / "saved"))
    other = Plain()
    load_scales(other, tmp_path / "saved" / "scales.safetensors")
    assert torch.equal(logits(other.inner, "llama"), logits(model.inner.eval(), "llama"))


def _ranks(rank: int, folder: str) -> None:
    """Both begin with the model of the first one, and make the same steps on different rows."""
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    model = made("int4")
    if rank == 1:
        with torch.no_grad():
            model.lm_head.weight.qdata.zero_()
    args = arguments(folder, per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2)
    ZOTrainer(model, args, train_dataset=ROWS).train()
    torch.save((scales(model), integers(model)), Path(folder) / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_processes_begin_and_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    torch.multiprocessing.spawn(_ranks, (str(tmp_path),), nprocs=2)
    (first, own), (second, its) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    assert same(own, its)
    assert same(own, integers(made("int4")))
