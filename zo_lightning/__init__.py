"""Forward-only fine-tuning inside Lightning, Hugging Face and plain PyTorch loops.

Importing this package makes ``Trainer(strategy="zo")`` and ``"zo_ddp"`` known to ``lightning`` and
``pytorch_lightning``. It imports neither of them, nor torch: the names below are loaded at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zo_lightning import _registration, _sources

if TYPE_CHECKING:
    from zo_lightning.engine import SPSA, DivergenceError, Safeguard, ZOOptimizer, ZOWarning
    from zo_lightning.strategy import ZODDPStrategy, ZOModelParallelStrategy, ZOStrategy

__version__ = "0.1.0"

__all__ = [
    "SPSA",
    "DivergenceError",
    "Safeguard",
    "ZODDPStrategy",
    "ZOModelParallelStrategy",
    "ZOOptimizer",
    "ZOStrategy",
    "ZOWarning",
    "__version__",
]

_ENGINE = ("SPSA", "DivergenceError", "Safeguard", "ZOOptimizer", "ZOWarning")
_HOMES = dict.fromkeys(_ENGINE, "zo_lightning.engine")
_HOMES |= dict.fromkeys(("ZODDPStrategy", "ZOModelParallelStrategy", "ZOStrategy"), "zo_lightning.strategy")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_sources.install()  # before anything that could ask for zo_lightning.callbacks
_registration.install()
