"""Heads that a checkpoint did not have: found on a model of transformers, and what to do instead of training them from nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import say_once

LOADED = "_is_hf_initialized"
"""What transformers sets on the parameters that it has read from a checkpoint, and not on those that it has drawn."""

DEVIATIONS = 4.0
"""By how many standard errors the spread of a drawn matrix may differ from that of its distribution."""


def new_heads(model: nn.Module) -> list[str]:
    """Names of the weight matrices outside of a pretrained body that were drawn at random because its checkpoint did not have them.

    Two signs together: transformers marks the parameters that it reads from a checkpoint, and these have no mark while the body has; and
    they are as they were drawn: biases exactly zero, a matrix without a bias spread as config.initializer_range says (within 4 standard
    errors). So nothing is found on models that are built from a configuration alone, nor on copies by `copy.deepcopy` (which carry no
    marks), nor on heads that were trained or written since.
    """
    return [name for prefix, part in _pretrained(model) for name in _new(part, prefix)]


def say_new_heads(model: nn.Module) -> None:
    """The advice, once, where a run begins with such a head."""
    found = new_heads(model)
    if found:
        say_once(
            "prompts.new_head",
            f"{', '.join(found)} was not in the checkpoint and is random. Forward-only training hardly gets a head from nothing: state the "
            "task as a prompt for the pretrained language model head (zo_lightning.prompts.Prompt), or begin with a linear probe "
            "(zo_lightning.prompts.linear_probe(model, train_dataloader)).",
        )


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost models of transformers in it that have a head beside a body."""
    inside: list[str] = []
    for name, part in model.named_modules(remove_duplicate=True):
        if any(name.startswith(f"{outer}.") or not outer for outer in inside):
            continue
        body = getattr(part, "base_model_prefix", "")
        if isinstance(body, str) and body and hasattr(part, "config") and isinstance(getattr(part, body, None), nn.Module):
            inside.append(name)
            yield (f"{name}." if name else ""), part


def _new(part: Any, prefix: str) -> Iterator[str]:
    body = {id(parameter) for parameter in getattr(part, part.base_model_prefix).parameters()}
    if not any(getattr(parameter, LOADED, False) for parameter in getattr(part, part.base_model_prefix).parameters()):
        return
    spread = getattr(part.config, "initializer_range", None)
    for name, module in part.named_modules():
        weight = module._parameters.get("weight")  # wrappers pass on what they wrap
        if "original_module" in name or "lora_" in name or not isinstance(weight, nn.Parameter) or weight.dim() != 2 or id(weight) in body:
            continue
        if _unmarked(part, name, weight) and _as_drawn(weight, module._parameters.get("bias"), spread):
            yield f"{prefix}{name}.weight"


def _unmarked(part: Any, name: str, weight: Tensor) -> bool:
    """Whether it was not read; peft trains a copy of a module, whose original has the mark."""
    outer, copied, _ = name.partition(".modules_to_save.")
    original = getattr(part.get_submodule(outer), "original_module", None) if copied else None
    return not getattr(weight if original is None else getattr(original, "weight", weight), LOADED, False)


def _as_drawn(weight: Tensor, bias: Tensor | None, spread: float | None) -> bool:
    if weight.is_meta or not weight.is_floating_point():
        return False
    if bias is not None:
        return not bool(bias.detach().any())
    if not spread or weight.numel() < 2:
        return False
    error = 1 / math.sqrt(2 * weight.numel())
    return abs(float(weight.detach().float().square().mean().sqrt()) / spread - 1) < DEVIATIONS * error + _rounding(weight.dtype)


def _rounding(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)
