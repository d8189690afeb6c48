"""What hosts and the engine tell a user: what makes steps do nothing, and what can't be loaded."""

from __future__ import annotations

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

FORGOTTEN = (
    "What the estimator remembers of earlier steps was given up while a step was measured: other tensors are trained, or weights were "
    "changed by something else, since its first micro-batch. Do that between two steps. The step was not made."
)

NOT_TO_EVALUATE_AGAIN = (
    "Micro-batches of this step were measured before a checkpoint was loaded, or by another copy of the optimizer. A line search (search=) "
    "evaluates them again, and they are gone. Resume from a state that was saved between two steps."
)

TOO_FEW_POINTS = (
    'Invalid parallel: "{parallel}" shares the {points} points of {estimator} among its processes, and some would have none. Train more '
    "weights, or use fewer processes for perturbation and more for data."
)

NOT_FINITE = "Lower eps or lr, use bfloat16 or float32, or look at the data."
NO_SLOPE = (
    "The loss itself was: an operation has no derivative where it was evaluated, such as a square root or a norm at 0. Add a small number "
    "inside of it, or use the estimator SPSA(), which needs none."
)
