"""Host settings that mean something else here, other trainers (Seq2Seq, trl, PEFT), compiled and placed models."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from hf_tools import VOCAB, arguments, bert, llama, losses, same, sentences, texts, tokenizer, tokens, trainer, weights
from torch import nn
from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration
from transformers.training_args import ParallelMode

from zo_lightning.engine.messages import ZOWarning
from zo_lightning.hf_integration import ZOConfig, ZOSeq2SeqTrainer, ZOTrainer, ZOTrainerMixin

# trl and peft use the old names of activation checkpointing themselves.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?`:FutureWarning")


def said(record: Any) -> str:
    """All ZOWarnings of a recording."""
    return "\n".join(str(entry.message) for entry in record if issubclass(entry.category, ZOWarning))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm=0.5 does nothing.*zo_clip"),
        ({"activation_checkpointing": True}, "gradient_checkpointing is turned off.*use_reentrant"),
        ({"adam_beta1": 0.8}, "adam_beta1=0.8 does nothing"),
        ({"adam_epsilon": 1e-3}, "adam_epsilon=0.001 does nothing.*zo_eps"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters=True does nothing"),
        ({"fp16": True}, "fp16=True keeps its autocast.*scaler is off"),
        ({"learning_rate": 5e-5}, "learning_rate=5e-05 is the default of TrainingArguments.*Usual"),
        ({"weight_decay": 0.01}, "weight_decay=0.01 is taken over from an AdamW.*Usual"),
    ],
)
def test_settings_that_do_nothing_or_come_from_adamw_are_named_once(
    given: dict[str, Any], message: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for _ in range(2):
        trainer(tmp_path, max_steps=1, **given).train()
    messages = said(recwarn).split("\n")
    assert [bool(re.search(message, text)) for text in messages] == [True]


def test_default_settings_are_not_worth_a_message(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer(tmp_path, max_steps=1).train()
    assert said(recwarn) == ""


def test_gradient_checkpointing_is_off_in_arguments_and_model(tmp_path: Path) -> None:
    model = bert()
    model.activation_checkpointing_enable()
    args = arguments(tmp_path, activation_checkpointing=True)
    with pytest.warns(ZOWarning, match="gradient_checkpointing is turned off"):
        host = ZOTrainer(model, args, train_dataset=texts())
    host.train()
    assert not host.args.activation_checkpointing
    assert not model.is_activation_checkpointing
    assert args.activation_checkpointing  # the user's object is not touched


def test_several_visible_gpus_do_not_become_data_parallel(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.warns(ZOWarning, match=r"2 GPUs.*nn\.DataParallel is off.*torchrun"):
        host = ZOTrainer(bert(), args, train_dataset=texts())
    host.train()
    assert not isinstance(host.model_wrapped, nn.DataParallel)
    assert (host.args.n_gpu, args.n_gpu, host._train_batch_size) == (1, 2, 8)


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match=r"DeepSpeed.*zero2\.json"):
        ZOTrainer(bert(), args, train_dataset=texts())


def test_fsdp_where_accelerate_shards_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "parallel_mode", ParallelMode.DISTRIBUTED)
    args.fsdp, args.fsdp_config = True, {"version": 2, "xla": False}
    with pytest.warns(ZOWarning, match="accelerate shards no model here"):
        ZOTrainer(bert(), args, train_dataset=texts())


@pytest.mark.parametrize(("name", "message"), [("deepspeed", "does not run under"), ("fsdp", "this is FSDP 1")])
def test_modes_switched_on_by_the_launcher_are_refused(name: str, message: str, tmp_path: Path) -> None:
    class Launched:
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
            setattr(self, f"is_{name}_enabled", True)

    from transformers import Trainer

    kind = type("LaunchedTrainer", (ZOTrainerMixin, Launched, Trainer), {})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, kind=kind)


def test_parallelism_config_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.parallelism_config = accelerate.ParallelismConfig(tp_size=2)
    with pytest.raises(ValueError, match="'tp': 2"):
        ZOTrainer(bert(), args, train_dataset=texts())


def test_a_model_placed_by_device_map_trains(tmp_path: Path) -> None:
    plain = trainer(tmp_path, bert(dropout=0.0))
    plain.train()
    model = accelerate.dispatch_model(bert(dropout=0.0), {"": "cpu"}, force_hooks=True)
    host = trainer(tmp_path, model)
    host.train()
    assert same(weights(model), weights(plain.model))


def test_a_model_offloaded_by_accelerate_is_an_error(tmp_path: Path) -> None:
    model = accelerate.cpu_offload(bert(), execution_device="cpu")
    with pytest.raises((ValueError, RuntimeError), match=r"meta|offload"):
        trainer(tmp_path, model).train()


def test_torch_compile_of_the_arguments(tmp_path: Path) -> None:
    host = trainer(tmp_path, bert(dropout=0.0), torch_compile=True, torch_compile_backend="eager", zo_eps=1e-2)
    host.train()
    plain = trainer(tmp_path, bert(dropout=0.0), zo_eps=1e-2, zo_weights="inplace")
    plain.train()
    assert hasattr(host.model_wrapped, "_orig_mod")
    assert host.zo_optimizer.zero_difference_steps == 0
    assert losses(host) == pytest.approx(losses(plain), rel=1e-5)


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def test_seq2seq_predicts_with_generate(tmp_path: Path) -> None:
    predicted: list[Any] = []
    rows = [{**row, "labels": row["input_ids"][:4]} for row in texts()]
    host = trainer(
        tmp_path,
        t5(),
        ZOSeq2SeqTrainer,
        rows,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=6,
            eval_strategy="steps",
            eval_steps=2,
            gradient_accumulation_steps=2,
        ),
        eval_dataset=rows[:8],
        compute_metrics=lambda prediction: predicted.append(prediction.predictions) or {"done": 1.0},
    )
    before = weights(host.model)
    host.train()
    assert [rows.ndim for rows in predicted] == [2, 2]  # generated tokens; logits would have three dimensions
    assert all(np.issubdtype(rows.dtype, np.integer) for rows in predicted)
    assert not same(weights(host.model), before)


def sft(folder: Path, kind: type, args: Any, **given: Any) -> Any:
    return kind(model=llama(), args=args, train_dataset=sentences(), processing_class=tokenizer(), **given)


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """trl, without its telemetry."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")
    return pytest.importorskip("trl")


@pytest.mark.parametrize("config", ["SFTConfig", "ZOConfig", "both"])
def test_trl_counts_tokens_once(config: str, trl: Any, tmp_path: Path) -> None:
    kind = type("ZOSFTTrainer", (ZOTrainerMixin, trl.SFTTrainer), {})
    from dataclasses import dataclass

    from zo_lightning.hf_integration import ZOArguments

    both = dataclass(type("ZOSFTConfig", (ZOArguments, trl.SFTConfig), {}))
    made, given = {
        "SFTConfig": (trl.SFTConfig, {"bf16": False}),
        "ZOConfig": (ZOConfig, {"zo_eps": 1e-2}),
        "both": (both, {"bf16": False, "zo_eps": 1e-2}),
    }[config]
    keywords = {"zo_eps": 1e-2} if config == "SFTConfig" else {}
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        host = sft(tmp_path, kind, arguments(tmp_path, made, **given), **keywords)
        host.train()
    assert ("gradient_checkpointing is turned off" in said(record)) == (config != "ZOConfig")  # SFTConfig turns it on
    assert not host.args.activation_checkpointing
    assert host.zo_options.eps == host.zo_optimizer.eps == 1e-2
    assert host.zo_optimizer.forward_passes == 8
    lengths = [5 + i % 3 + 1 for i in range(32)]
    assert host._total_train_tokens == sum(lengths)
    assert losses(host, "num_tokens")[-1] == sum(lengths)
    assert all(0 <= value <= 1 for value in losses(host, "mean_token_accuracy"))


def test_trl_first_order_when_told(trl: Any, tmp_path: Path) -> None:
    kind = type("ZOSFTTrainer", (ZOTrainerMixin, trl.SFTTrainer), {})
    host = sft(tmp_path, kind, arguments(tmp_path, ZOConfig, optim="sgd", max_steps=1))
    host.train()
    assert isinstance(host.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_peft_adapters_alone_are_trained(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = peft.get_peft_model(llama(), configs[method])
    before = weights(model)
    with pytest.warns(ZOWarning, match="gradient_checkpointing is turned off"):
        host = trainer(tmp_path, model, data=tokens(), activation_checkpointing=True, label_names=["labels"], zo_eps=1e-2)
    host.train()
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed
    assert changed <= trained


def test_hyperparameters_may_change_between_runs(tmp_path: Path) -> None:
    """model_init makes a new model, and with it a new engine that reads the arguments as they are now."""
    host = trainer(tmp_path, args=arguments(tmp_path, ZOConfig, max_steps=1), model_init=lambda trial=None: bert())
    host.train()
    first = host.zo_optimizer
    host.args.zo_eps, host.args.learning_rate = 1e-2, 1e-4
    host.train()
    assert (first.eps, host.zo_optimizer.eps) == (1e-3, 1e-2)
    assert losses(host, "learning_rate") == [1e-4]
