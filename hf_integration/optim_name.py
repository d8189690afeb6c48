"""Makes "zo" a name that TrainingArguments(optim=...) and --optim accept, and a plain Trainer refuses with advice."""

from __future__ import annotations

from typing import Any, NoReturn

import transformers.trainer
from transformers.training_args import OptimizerNames

NAME = "zo"

USE_INSTEAD = (
    "optim='zo' trains with forward passes only, which transformers.Trainer cannot do by itself. Use "
    "zo_lightning.hf_integration.ZOTrainer (or ZOSeq2SeqTrainer) in its place, or put ZOTrainerMixin in front of your "
    "own trainer: class MyZOTrainer(ZOTrainerMixin, MyTrainer)."
)


def register() -> None:
    """Add "zo" to ``OptimizerNames``; a second call changes nothing.

    The member exists for ``HfArgumentParser``, which offers the enum's members as the choices of ``--optim``. Looking
    the value up gives the plain string: ``TrainingArguments`` then pickles (``training_args.bin``) without any
    reference to this package, and loads where it is not installed.
    """
    values: dict[Any, Any] = OptimizerNames._value2member_map_
    if NAME not in values:
        member = str.__new__(OptimizerNames, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        member._sort_order_ = len(OptimizerNames._member_names_)  # type: ignore[attr-defined]
        OptimizerNames._member_map_[member._name_] = member
        OptimizerNames._member_names_.append(member._name_)
        values[NAME] = NAME
    # Absent before transformers 5: its Trainer then names the optimizer it cannot make, without this advice.
    handlers: dict[str, Any] | None = getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", None)
    if handlers is not None:
        handlers[NAME] = _refuse


def _refuse(context: object) -> NoReturn:
    """What a plain ``Trainer`` calls to build its optimizer for the name "zo"."""
    raise ValueError(USE_INSTEAD)
