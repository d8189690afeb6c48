"""Prompted tasks, which forward-only fine-tuning works best on: prompts, new heads that are noticed, heads that begin as a linear probe."""

from zo_lightning.prompts.heads import new_heads
from zo_lightning.prompts.probe import Probe, linear_probe
from zo_lightning.prompts.prompt import Prompt

__all__ = ["Probe", "Prompt", "linear_probe", "new_heads"]
