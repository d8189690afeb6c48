"""What a benchmark runs on: any transformers configuration with random weights, and one fixed batch."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

TASKS = {"causal-lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Workload(NamedTuple):
    """A model in training mode on its device, and the inputs of one step; `loss()` is one forward pass."""

    model: nn.Module
    inputs: dict[str, Tensor]

    def loss(self) -> Tensor:
        loss: Tensor = self.model(**self.inputs).loss
        return loss


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model and batch."""
    parser.add_argument("--config", default="opt", help="a transformers model type (its default configuration) or a config.json")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the configuration: --set num_hidden_layers=4")
    parser.add_argument("--dropout", type=float, default=0.0, help="all dropout rates; 0 makes forward passes, the yardstick, cheapest")
    parser.add_argument("--task", choices=TASKS, default="causal-lm")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train LoRA of this rank on queries and values instead of all weights"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="torch's intra-op threads; default: torch's")


def configuration(name: str, changes: list[str], dropout: float) -> PretrainedConfig:
    """The configuration that --config, --set and --dropout name; ValueError for a name=value that it does not have."""
    config = AutoConfig.from_pretrained(name) if Path(name).exists() else AutoConfig.for_model(name)
    for change in changes:
        key, _, value = change.partition("=")
        if not value or not hasattr(config, key):
            raise ValueError(f"--set {change}: {type(config).__name__} has no {key!r}, or no value was given; write NAME=VALUE.")
        setattr(config, key, _literal(value))
    for key in list(config.to_dict()):
        if key.endswith(("dropout", "dropout_prob", "pdrop", "dropout_p")) and isinstance(getattr(config, key), float):
            setattr(config, key, dropout)
    return config


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(options: argparse.Namespace) -> Workload:
    """The workload of the parsed options."""
    torch.manual_seed(0)
    config = configuration(options.config, options.set, options.dropout)
    model = TASKS[options.task].from_config(config, dtype=DTYPES[options.dtype]).to(options.device).train()
    ids = torch.randint(3, int(config.vocab_size), (options.batch, options.length), device=options.device)
    classes = torch.randint(0, int(config.num_labels or 2), (options.batch,), device=options.device)
    labels = ids.clone() if options.task == "causal-lm" else classes
    if options.lora:
        model = with_lora(model, options.lora)
    return Workload(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """LoRA where peft puts it by itself: on the projections of queries and values of the architectures that it knows."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank))


def describe(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """What the results were measured on, for the JSON file."""
    parameters = list(workload.model.parameters())
    return {
        "config": type(workload.model.config).__name__,
        "changes": options.set,
        "dropout": options.dropout,
        "task": options.task,
        "dtype": options.dtype,
        "lora": options.lora,
        "batch": options.batch,
        "length": options.length,
        "device": options.device,
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }
