"""What the library says to its user: once per process, as a warning that can be filtered."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

_said: set[str] = set()


class ZOWarning(UserWarning):
    """A setting that does nothing here, a value that was inherited, or a state that the user should know of."""


def say_once(key: str, message: str) -> None:
    """Emit `message` as a `ZOWarning` the first time that `key` is seen in this process."""
    if key not in _said:
        _said.add(key)
        warnings.warn(message, ZOWarning, stacklevel=3)


def tell_once(key: str, message: str) -> None:
    """Tell what was chosen, where nothing is wrong: to the logger "zo_lightning", at level INFO, the first time that `key` is seen."""
    if key not in _said:
        _said.add(key)
        logging.getLogger("zo_lightning").info(message)


def reset() -> None:
    """Forget what was said (for tests)."""
    _said.clear()


def choose(option: str, value: object, allowed: Mapping[str, object], objects: str = "") -> object:
    """The entry of `allowed` called `value`; ValueError that lists the names, and says which `objects` would do, otherwise."""
    if isinstance(value, str) and value in allowed:
        return allowed[value]
    names = ", ".join(repr(name) for name in allowed)
    raise ValueError(f"{option}={value!r} is not known. Use one of {names}{objects and f', or {objects}'}.")


def check_number(name: str, value: Any, allowed: str, good: Any) -> None:
    """Raise ValueError unless `value` is a finite number for which `good` holds."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (bool, str, bytes)) or not math.isfinite(number) or not good(number):
        raise ValueError(f"Invalid {name}: {value!r}. Must be a finite number {allowed}.")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"Invalid {name}: {value!r}. Must be True or False.")


def check_count(name: str, value: Any, meaning: str = "", least: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`; `meaning` says what it counts."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Invalid {name}: {value!r}. Must be an integer >= {least}{meaning and f' ({meaning})'}.")
