"""The last layers by backpropagation, the rest forward-only."""

from zo_lightning.engine.backprop.graph import NO_GRAPH, Graph
from zo_lightning.engine.backprop.options import Backprop, as_backprop
from zo_lightning.engine.backprop.tail import Tail

__all__ = ["NO_GRAPH", "Backprop", "Graph", "Tail", "as_backprop"]
