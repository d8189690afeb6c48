"""What hosts and the engine tell a user: the learning rates that usually work, and what makes steps do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from zo_lightning.engine.parameters import Trained

_BY_SIZE = (
    (1e9, "1e-7 to 1e-6 for all weights of a model of billions of parameters"),
    (1e8, "1e-6 to 1e-5 for all weights of a model of hundreds of millions of parameters"),
    (1e7, "1e-5 to 1e-4 for all weights of a model of tens of millions of parameters"),
    (0.0, "1e-4 to 1e-2 for less than ten million parameters"),
)


def usual_lr(trained: Sequence[Trained]) -> str:
    """The range of learning rates for SPSA on these tensors, in words (MeZO's tables, arXiv 2305.17333, and our own runs)."""
    names = [parameter.name for parameter in trained]
    if names and all("lora_" in name for name in names):
        return "5e-5 to 1e-4 for LoRA"
    if names and all("prompt" in name or "prefix" in name for name in names):
        return "1e-3 to 1e-2 for prefix and prompt tuning"
    size = sum(parameter.tensor.numel() for parameter in trained)
    return next(text for least, text in _BY_SIZE if size >= least)


ZERO_STEPS = 20
"""After so many steps without any difference between the points, the user is told."""

NO_DIFFERENCE = (
    f"The objective had the same value at every point in {ZERO_STEPS} steps in a row, so nothing was learned in them. Either it changes in "
    "steps (accuracy on a small batch: use a larger batch or eps), it is computed in too low a precision, or the perturbation does not "
    "reach the model (a compiled, exported or cached copy of it is evaluated)."
)

NOTHING_TO_TRAIN = (
    "There is no trainable parameter: every tensor is frozen (requires_grad=False) or not floating point. Unfreeze what should be trained, "
    "or add adapters."
)

NO_LOSS = (
    'step() found gradients and no loss: this loop calls backward(). Use strategy="zo" in Lightning, ZOTrainer in place of Trainer, or '
    "optimizer.step(closure) with a closure that returns the loss."
)

NOT_SAVED_HERE = (
    "The state is not that of a ZOOptimizer (it has no 'zo' entry): it was saved by another optimizer. Load the weights alone; moments of "
    "a first-order optimizer have no use here."
)
