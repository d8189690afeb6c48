"""Settings that can't work without gradients: an error where training would be wrong, one sentence where they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from zo_lightning.strategy.namespace import Namespace

Say = Callable[[str, str], None]

_FOREIGN_PRECISION = ("DeepSpeedPrecision", "FSDPPrecision", "XLAPrecision")
_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")


def check_run(trainer: Any, module: Any, ns: Namespace) -> None:
    """Raise MisconfigurationException for what can't be trained by forward passes."""
    if not module.automatic_optimization:
        raise ns.misconfiguration(
            f"{type(module).__name__}.automatic_optimization is False. Manual optimization calls backward itself, and forward-only "
            'training has none: with strategy="zo", return the loss from training_step and leave automatic_optimization at True.'
        )
    if ns.get("utilities.signature_utils", "is_param_in_hook_signature")(module.training_step, "dataloader_iter", explicit=True):
        raise ns.misconfiguration(
            "training_step(dataloader_iter) fetches its batch itself, so that each forward pass of a step would see another batch. "
            "Use training_step(batch, batch_idx)."
        )
    plugin = trainer.precision_plugin
    if isinstance(plugin, tuple(ns.get("plugins", name) for name in _FOREIGN_PRECISION)):
        raise ns.misconfiguration(
            f'{type(plugin).__name__} belongs to another strategy. With strategy="zo" use Trainer(precision="32-true", "bf16-mixed", ...).'
        )


def say_idle(trainer: Any, module: Any, ns: Namespace, say: Say) -> None:
    """Say once which settings of the Trainer and hooks of the user have nothing to act on."""
    if trainer.gradient_clip_val:
        say(
            "lightning.clip",
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) does nothing: there is no gradient to clip. "
            "ZOStrategy(clip=...) bounds the projected gradient, Backprop(max_norm=...) the gradient of backprop=.",
        )
    if trainer._detect_anomaly:
        say("lightning.anomaly", "Trainer(detect_anomaly=True) does nothing: there is no backward pass.")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        say("lightning.scaler", "The loss scaler of 16-mixed precision does nothing: no gradient can underflow. Autocast works as always.")
    if ns.is_overridden("backward", module):
        say("lightning.backward", f"{type(module).__name__}.backward is never called: there is no backward pass.")
    readers = [f"{type(module).__name__}.{hook}" for hook in _GRADIENT_HOOKS if ns.is_overridden(hook, module)]
    for callback in trainer.callbacks:
        base = getattr(ns.get("callbacks", "Callback"), "__dict__", {})
        own = (hook for hook in _GRADIENT_HOOKS if hook in base and getattr(type(callback), hook, base[hook]) is not base[hook])
        readers += [f"{type(callback).__name__}.{hook}" for hook in own]
    if readers:
        say("lightning.hooks", f"{', '.join(readers)} is called, but every parameter's .grad is None there: no gradient is computed.")


def disable_checkpointing(module: nn.Module, say: Say) -> None:
    """Activation checkpointing of transformers' models saves nothing here, switches their cache off and breaks prefix tuning."""
    for part in module.modules():
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # its name since transformers 5.20, and before
            if hasattr(type(part), f"is_{name}"):
                if getattr(part, f"is_{name}"):
                    getattr(part, f"{name}_disable")()
                    say("lightning.checkpointing", f"{name} is switched off: without a backward pass no activations are kept.")
                break


def tell_device(module: Any, device: Any) -> None:
    """`module.device`, which Lightning sets where it moves the module as a whole."""
    mixin: Any = next(kind for kind in type(module).__mro__ if kind.__name__ == "_DeviceDtypeModuleMixin")
    for part in module.modules():
        if isinstance(part, mixin):
            part._device = device
