"""From what Hugging Face users write (config fields, --optim_args, keywords of the trainer) to the engine's options."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from zo_lightning.engine.backprop import Backprop
from zo_lightning.engine.estimators import ESTIMATORS
from zo_lightning.engine.messages import choose
from zo_lightning.engine.options import EngineOptions

PREFIX = "zo_"
OF_ESTIMATOR: dict[str, Any] = {"queries": 1, "fitness": "values"}
"""Options of the estimator that is named, and their defaults."""
BACKPROP_LR = "backprop_lr"
"""Beside "backprop"."""
NAMES = (*(f.name for f in dataclasses.fields(EngineOptions) if f.name not in ("mask", "objective")), *OF_ESTIMATOR, BACKPROP_LR)
_TRUE, _FALSE, _NONE = ("true", "1", "yes"), ("false", "0", "no"), ("none", "null", "")
_COMMA = re.compile(r",(?![^(]*\))")
"""Between two options: not inside of brackets."""
_READ = {"lr": float, "weight_decay": float, "eps": float, "clip": float, "seed": int, "max_nonfinite": int}
_READ |= {"queries": int, BACKPROP_LR: float}

_WITHOUT = {True: "names no parameters", False: "has one of its own"}


def take_options(keywords: dict[str, Any]) -> dict[str, Any]:
    """Remove the ``zo_*`` entries from the trainer's keywords and return them without their prefix.

    Raises ``TypeError`` for a ``zo_`` name that no option has.
    """
    found = {key: keywords.pop(key) for key in [key for key in keywords if key.startswith(PREFIX)]}
    for key in found:
        if key.removeprefix(PREFIX) not in NAMES:
            raise TypeError(f"{key} is not an option; there are {', '.join(PREFIX + name for name in NAMES)}.")
    return {key.removeprefix(PREFIX): value for key, value in found.items()}


def read_fields(args: object) -> dict[str, Any]:
    """The options that `args` carries as ``zo_*`` fields (a ZOConfig); none for plain TrainingArguments."""
    fields = {name: getattr(args, PREFIX + name) for name in NAMES if hasattr(args, PREFIX + name)}
    if str(fields.get("safeguard")).lower() in _NONE:
        fields["safeguard"] = None
    return fields


def read_optim_args(text: str | None) -> dict[str, Any]:
    """``--optim_args "eps=1e-2,queries=4"``, the host's own way to give options to an optimizer.

    Raises ``ValueError`` for a name that no option has and for a value that cannot be read.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in _COMMA.split(text or ""))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in NAMES or not equals:
            raise ValueError(f"optim_args has {item!r}. With optim='zo' it is a list like 'eps=1e-2,seed=1' of {', '.join(NAMES)}.")
        options[name] = _parse(name, value)
    return options


def _parse(name: str, text: str) -> Any:
    if text.lower() in _NONE:
        return None
    if name == "dropout":
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(f"optim_args has dropout={text!r}; it is true or false.")
        return text.lower() in _TRUE
    read = _READ.get(name, str)
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"optim_args has {name}={text!r}, which is not of type {read.__name__}.") from error


def engine_options(args: object, keywords: Mapping[str, Any] | None = None, fields: Mapping[str, Any] | None = None) -> EngineOptions:
    """Fields of `args` (or `fields`), then its ``optim_args``, then `keywords`: the later wins.

    Raises ``ValueError`` for a value that is out of range and a name that is not known.
    """
    given = {**(fields or {}), **read_fields(args)}
    if str(getattr(args, "optim", "")) == "zo":
        given.update(read_optim_args(getattr(args, "optim_args", None)))
    given.update(keywords or {})
    own = {name: given.pop(name, default) for name, default in OF_ESTIMATOR.items()}
    estimator = given.get("estimator") or "spsa"
    if isinstance(estimator, str):
        kind: Any = choose("estimator", estimator, ESTIMATORS, "an Estimator")
        takes = {field.name for field in dataclasses.fields(kind)}
        if idle := [name for name in differing(own) if name not in takes]:
            raise ValueError(f"zo_{idle[0]}={own[idle[0]]!r} does nothing beside zo_estimator={estimator!r}, which has none. Leave it out.")
        given["estimator"] = kind(**{name: value for name, value in own.items() if name in takes})
    elif idle := differing(own):
        raise ValueError(f"zo_{idle[0]}={own[idle[0]]!r} does nothing beside zo_estimator={estimator!r}: give it to the object.")
    lr = given.pop(BACKPROP_LR, None)
    if lr is not None:
        patterns = given.get("backprop")
        if patterns is None or isinstance(patterns, Backprop):
            raise ValueError(f"zo_{BACKPROP_LR}={lr!r} does nothing beside zo_backprop={patterns!r}, which {_WITHOUT[patterns is None]}.")
        given["backprop"] = Backprop(patterns, lr=lr)
    options = EngineOptions(**given)
    options.validate()
    return options


def differing(own: Mapping[str, Any]) -> list[str]:
    """The options of an estimator that are not their defaults."""
    return [name for name, default in OF_ESTIMATOR.items() if own[name] != default]
