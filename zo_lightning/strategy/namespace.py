"""Lightning exists twice, as lightning.pytorch and as pytorch_lightning; a strategy of ours becomes that of the Trainer it is given to."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

NAMES = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    class _Host(Strategy):
        """What the bound class inherits, while a Trainer runs."""

        lightning_module: Any
        model: Any
        global_rank: int
        world_size: int

else:
    _Host = object


class Namespace:
    """What the strategies use of one of the two class trees."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return namespace, (self.name,)

    def get(self, module: str, attribute: str) -> Any:
        """The attribute of a module of this namespace, e.g. get("plugins", "Precision")."""
        return getattr(import_module(f"{self.name}.{module}"), attribute)

    @cached_property
    def precision(self) -> Any:
        """The base of the precision plugins: runs the hooks around backward, without a loss scaler."""
        return self.get("plugins.precision", "Precision")

    @cached_property
    def loss_of(self) -> Callable[[Any], Any]:
        """The loss in what training_step returned, None to skip the batch; raises as Lightning does for anything else."""
        result = self.get("loops.optimization.automatic", "ClosureResult")
        return lambda output: result.from_training_step_output(output).closure_loss

    @cached_property
    def misconfiguration(self) -> type[Exception]:
        """Lightning's exception for settings that don't go together."""
        error: type[Exception] = self.get("utilities.exceptions", "MisconfigurationException")
        return error

    def is_overridden(self, hook: str, instance: Any) -> bool:
        """Whether a LightningModule or a callback has a hook of its own."""
        return bool(self.get("utilities.model_helpers", "is_overridden")(hook, instance))


@lru_cache
def namespace(name: str) -> Namespace:
    """The namespace called `name`."""
    return Namespace(name)


def namespace_of(instance: Any) -> Namespace:
    """The namespace that an object's class, or a class that it inherits from, belongs to."""
    for cls in type(instance).__mro__:
        for name in NAMES:
            if cls.__module__ == name or cls.__module__.startswith(f"{name}."):
                return namespace(name)
    raise TypeError(f"{type(instance).__name__} is no class of {' or '.join(NAMES)}.")


class Bindable(_Host):
    """A strategy that belongs to no namespace until a Trainer takes it.

    Until then it has the attributes that a Trainer reads first, and is a virtual subclass of both `Strategy` classes. The Trainer then
    hands it an accelerator; its namespace says which Trainer that was, and the object's class becomes one that also inherits from the
    `host_class` of that namespace. Given to a Trainer of the other namespace later, it changes again.
    """

    host_class: str
    """Name of Lightning's strategy class that does the rest."""

    def __init__(self, host: dict[str, Any]) -> None:
        self._zo_arguments = host
        self._zo_accelerator: Any = None
        self._accelerator = host.get("accelerator")  # what a Trainer reads; left alone, so that another Trainer can take the object
        self._precision_plugin = host.get("precision_plugin")
        self._checkpoint_io = host.get("checkpoint_io")

    @property
    def accelerator(self) -> Any:
        """The accelerator that the Trainer chose."""
        return self._zo_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        host = getattr(import_module(f"{namespace_of(accelerator).name}.strategies"), self.host_class)
        if not isinstance(self, host):
            self.__class__ = _bound(_unbound(type(self)), host)
            host.__init__(self, **self._zo_arguments)
        self._zo_accelerator = accelerator

    @property
    def namespace(self) -> Namespace:
        """That of the Trainer which the strategy belongs to."""
        return namespace_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        host = None if _unbound(type(self)) is type(self) else type(self).__bases__[1]
        return _rebuild, (_unbound(type(self)), host), self.__getstate__()


def _unbound(cls: type) -> type:
    return cls.__bases__[0] if vars(cls).get("_zo_bound") else cls


@lru_cache
def _bound(cls: type, host: type) -> type:
    metaclass: Any = type(host)
    bound: type = metaclass(cls.__name__, (cls, host), {"__module__": cls.__module__, "__doc__": cls.__doc__, "_zo_bound": True})
    return bound


def _rebuild(cls: type, host: type | None) -> Any:
    strategy: Any = object.__new__(cls)
    if host is not None:
        strategy.__class__ = _bound(cls, host)
    return strategy


def register(name: str) -> None:
    """Let the Trainer of namespace `name` take our strategies, by object, by their names ("zo", ...), and by bare class path (CLI)."""
    from zo_lightning.strategy.model_parallel import ZOModelParallelStrategy
    from zo_lightning.strategy.strategies import ZODDPStrategy, ZOStrategy

    strategies = import_module(f"{name}.strategies")
    for cls in (ZOStrategy, ZODDPStrategy, ZOModelParallelStrategy):
        strategies.Strategy.register(cls)
        for alias in (cls.strategy_name, f"zo_lightning.{cls.__name__}".lower()):
            strategies.StrategyRegistry.register(alias, cls, description=(cls.__doc__ or "").partition("\n")[0], override=True)
