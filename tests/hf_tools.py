"""Tiny random models, data and trainers for the Hugging Face tests; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from zo_lightning.hf_integration import ZOTrainer

VOCAB = 32


def bert(seed: int = 0, labels: int = 2, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> Any:
    """A sequence classifier whose loss ignores num_items_in_batch."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A language model whose loss divides by num_items_in_batch; embedding and head are tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def texts(count: int = 32, length: int = 8, labels: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Token rows with a class each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(labels)
        words = [draw.randrange(3 + label * 10, 13 + label * 10) for _ in range(length)]
        rows.append({"input_ids": words, "attention_mask": [1] * length, "labels": label})
    return rows


def tokens(count: int = 32, length: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Token rows that are their own labels, of which a varying number is masked."""
    rows = texts(count, length, seed=seed)
    for i, row in enumerate(rows):
        masked = i % 4
        row["labels"] = [-100] * masked + row["input_ids"][masked:]
    return rows


def per_token(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """The language model's loss without the model's cast to float32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words w0, w1, ..., built in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentences() -> Any:
    """A data set of plain text for it."""
    from datasets import Dataset

    return Dataset.from_dict({"text": [" ".join(f"w{4 + (i + j) % 20}" for j in range(5 + i % 3)) for i in range(32)]})


class Regression(nn.Module):
    """A plain module with BatchNorm that returns a dict with a loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x.to(self.dtype)).squeeze(-1)
        return {"loss": (out - labels.to(self.dtype)).square().mean(), "logits": out}


def numbers(count: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for Regression."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        x = [draw.gauss(0, 1) for _ in range(4)]
        rows.append({"x": x, "labels": sum(x)})
    return rows


def arguments(folder: Path | str, kind: type = TrainingArguments, **given: Any) -> Any:
    """Quiet arguments for a few CPU steps in sequential order."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "optim": "zo",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return kind(**{**defaults, **given})


def trainer(folder: Path | str, model: Any = None, kind: type = ZOTrainer, data: Any = None, **given: Any) -> Any:
    """A trainer over texts(); entries of `given` that it does not take itself become TrainingArguments."""
    own = ("eval_dataset", "callbacks", "compute_metrics", "compute_loss_func", "args", "model_init", "optimizers")
    own += ("data_collator", "optimizer_cls_and_kwargs", "processing_class")
    keywords = {k: given.pop(k) for k in list(given) if k in own or k.startswith("zo_")}
    args = keywords.pop("args", None) or arguments(folder, **given)
    if "model_init" not in keywords:
        keywords["model"] = bert() if model is None else model
    return kind(args=args, train_dataset=texts() if data is None else data, **keywords)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit-equal, names included."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def losses(host: Any, key: str = "loss") -> list[float]:
    """What the trainer logged under `key`, in order."""
    return [entry[key] for entry in host.state.log_history if key in entry]


class StopAt(TrainerCallback):
    """A run that is cut off: InterruptedError after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            raise InterruptedError
