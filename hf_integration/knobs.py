"""Settings of TrainingArguments that mean something else without a backward pass: refused, turned off or named once."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.options import EngineOptions
from zo_lightning.hf_integration.config import ZOArguments
from zo_lightning.hf_integration.optim_name import NAME

_USELESS = {
    "max_grad_norm": "there is no gradient whose norm could be clipped; zo_clip limits the projected gradient, Backprop(max_norm=...) the "
    "gradient of zo_backprop",
    "adam_beta1": "the update has no moments",
    "adam_beta2": "the update has no moments",
    "adam_epsilon": "the update has no moments; the size of the perturbation is zo_eps",
    "optim_target_modules": "it belongs to GaLore and APOLLO; freeze parameters to train only some",
    "ddp_find_unused_parameters": "the model is not wrapped in DistributedDataParallel",
    "ddp_bucket_cap_mb": "the model is not wrapped in DistributedDataParallel",
    "ddp_broadcast_buffers": "the model is not wrapped in DistributedDataParallel",
    "activation_offloading": "no activation is kept for a backward pass",
}


def is_default(args: TrainingArguments, name: str) -> bool:
    """Whether the field `name` has the value it gets when nobody sets it."""
    field = next((f for f in dataclasses.fields(args) if f.name == name), None)
    return field is None or bool(getattr(args, name) == field.default)


def decide(args: TrainingArguments, told: str | None) -> bool:
    """Whether to train forward-only; `told` is the trainer's own ``optim=``.

    Only the trainer's keyword and a ``ZOConfig`` (whose default is "zo") can ask for first-order training: in plain
    ``TrainingArguments`` a chosen "adamw_torch" looks like the default, so forward-only it is, and this is said once.
    Writes the decision to ``args.optim``; raises the host's ``ValueError`` for a name that does not exist.
    """
    if told is not None:
        args.optim = OptimizerNames(told)
    elif args.optim != NAME and not isinstance(args, ZOArguments):
        name = getattr(args.optim, "value", args.optim)
        say_once(
            "hf.optim",
            f"TrainingArguments(optim={name!r}) is not used: this trainer trains forward-only. Set optim='zo' to "
            f"confirm, or give the trainer itself optim={name!r} to train first-order.",
        )
        args.optim = OptimizerNames(NAME)
    return bool(args.optim == NAME)


def without_zo_fields(args: ZOArguments) -> TrainingArguments:
    """The same settings as plain TrainingArguments; trl rebuilds its own config from ``to_dict()`` of what it gets."""
    plain = object.__new__(TrainingArguments)
    plain.__dict__.update({key: value for key, value in vars(args).items() if not key.startswith("zo_")})
    return plain


def refuse(args: TrainingArguments) -> None:
    """Raise ``ValueError`` for parallel modes that own the weights."""
    if getattr(args, "deepspeed", None):
        raise ValueError(
            f"optim='zo' does not run under DeepSpeed (deepspeed={args.deepspeed!r}), which owns weights, gradients "
            "and optimizer. Remove it: without gradients and optimizer state the model alone has to fit."
        )
    parallel = getattr(args, "parallelism_config", None)
    sizes = {name: getattr(parallel, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
    if any(size and size > 1 for size in sizes.values()):
        raise ValueError(
            f"optim='zo' does not run with parallelism_config sizes {sizes} yet: only copies of the model "
            "(dp_replicate) are possible. Set the others to 1."
        )


def adapt(args: TrainingArguments) -> None:
    """Turn off in `args`, in place, what cannot help here, and say so once; may run twice on one object."""
    refuse(args)
    for name, why in _USELESS.items():
        if getattr(args, name, None) and not is_default(args, name):
            say_once(f"hf.{name}", f"{name}={getattr(args, name)!r} does nothing with optim='zo': {why}.")
    if getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False):
        _say_checkpointing()
        args.gradient_checkpointing = False
        args.activation_checkpointing = False
    if args.fp16:
        say_once("hf.fp16", "fp16=True keeps its autocast with optim='zo'; the loss scaler is off: nothing overflows.")
    if args.n_gpu > 1:
        say_once(
            "hf.n_gpu",
            f"{args.n_gpu} GPUs are visible and optim='zo' uses one: nn.DataParallel is off, because it copies the "
            "model in every forward pass. Start the script with torchrun to use all of them.",
        )
        args._n_gpu = 1


def stop_checkpointing(model: Any) -> None:
    """Turn off, and say once, the checkpointing that was switched on in the model itself."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # since transformers 5.20, before
        if hasattr(model, f"is_{name}"):
            if getattr(model, f"is_{name}"):
                _say_checkpointing()
                getattr(model, f"{name}_disable")()
            return


def _say_checkpointing() -> None:
    say_once(
        "hf.gradient_checkpointing",
        "gradient_checkpointing is turned off (and with it use_reentrant): optim='zo' has no backward pass, so nothing is kept for one.",
    )


def say_inherited(args: TrainingArguments, options: EngineOptions, usual: str) -> None:
    """Name a learning rate or weight decay that comes from an AdamW configuration; `usual` is the usual lr."""
    if options.lr is None and is_default(args, "learning_rate"):
        say_once(
            "hf.learning_rate",
            f"learning_rate={args.learning_rate!r} is the default of {type(args).__name__}, chosen for AdamW. "
            f"Usual is {usual}. Set learning_rate (or zo_lr) to choose.",
        )
    if options.weight_decay is None and args.weight_decay:
        say_once(
            "hf.weight_decay",
            f"weight_decay={args.weight_decay!r} is taken over from an AdamW configuration: it shrinks the weights by "
            "learning_rate * weight_decay in every step. Usual is 0. Set zo_weight_decay to "
            "choose.",
        )
