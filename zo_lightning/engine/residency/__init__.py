"""How perturbed weights come to exist for one forward pass: on scratch copies, or in place."""

from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.residency.batched import Batched, Population
from zo_lightning.engine.residency.choose import WEIGHTS, build_residency
from zo_lightning.engine.residency.exact import Exact
from zo_lightning.engine.residency.inplace import InPlace
from zo_lightning.engine.residency.lane import Lane
from zo_lightning.engine.residency.masters import Masters
from zo_lightning.engine.residency.offloaded import Offload, Offloaded, Traffic
from zo_lightning.engine.residency.scratch import Copy

__all__ = [
    "WEIGHTS",
    "Batched",
    "Copy",
    "Exact",
    "InPlace",
    "Lane",
    "Masters",
    "Offload",
    "Offloaded",
    "Population",
    "Residency",
    "Traffic",
    "build_residency",
]
