"""Finds models whose loss ignores num_items_in_batch, which the host takes for scaled by it and then sums too high."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch

from zo_lightning.hf_integration.quiet import rerun, unseen

if TYPE_CHECKING:
    from transformers import Trainer


def may_ignore_items(trainer: Trainer) -> bool:
    """Whether it would matter that the loss ignores ``num_items_in_batch``, and nobody has said how it is scaled.

    transformers (5.23) takes any model whose forward has ``**kwargs`` for one that divides by
    ``num_items_in_batch``. For the others (sequence classification above all) the loss, and so the step, comes out
    multiplied by the accumulation and by the number of processes; Adam hides that, an SGD step does not.
    """
    several = trainer.args.gradient_accumulation_steps > 1 or trainer.args.world_size > 1
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)  # absent before transformers 5.19
    return several and stated is None and trainer.compute_loss_func is None


def ignores_items(trainer: Trainer, inputs: dict[str, Any], num_items: Any) -> bool:
    """Evaluate the loss of `inputs` with `num_items` and with twice as many: equal losses mean that it is ignored.

    Two forward passes in evaluation mode (no dropout, no running statistics), once a run, leaving no trace.
    """
    model: Any = trainer.model
    training = model.training
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.no_grad(), unseen(rerun(trainer), trainer), torch.random.fork_rng(list(devices)):
        model.eval()
        try:
            once, twice = (_loss(trainer, inputs, count) for count in (num_items, 2 * num_items))
        finally:
            model.train(training)
    return bool(torch.isfinite(once)) and bool(once != 0) and bool(once == twice)


def _loss(trainer: Trainer, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
    prepared = trainer._prepare_inputs(copy.copy(inputs))
    loss: Any = trainer.compute_loss(cast("Any", trainer.model), prepared, num_items_in_batch=num_items)
    return cast("torch.Tensor", loss.detach())
