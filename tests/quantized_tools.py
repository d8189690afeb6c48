"""Tiny models of five shapes whose linear layers are quantized by torchao."""

from __future__ import annotations

from typing import Any

import torch
from peft_tools import base
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

CONFIGS: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


def quantized(shape: str = "llama", bits: str = "int4", dtype: torch.dtype = torch.float32) -> Any:
    """As somebody has it who has not heard of us; always the same."""
    model = base(shape).to(dtype)
    quantize_(model, CONFIGS[bits])
    return model


def integers(model: Any) -> dict[str, Tensor]:
    """The integers of all quantized weights, copied."""
    return {name: weight.qdata.clone() for name, weight in model.named_parameters() if hasattr(weight, "qdata")}


def scales(model: Any) -> dict[str, Tensor]:
    """What is trained, copied."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
