"""Several processes: who evaluates what on which data, and the exchange of scalars between them."""

from zo_lightning.engine.parallel.equality import Equality, UnequalRanksError
from zo_lightning.engine.parallel.exchange import Exchange
from zo_lightning.engine.parallel.mesh import NOT_SHARDED, UNSET, Mesh, as_mesh, mesh_of
from zo_lightning.engine.parallel.processes import DataParallel, PeerError, Processes
from zo_lightning.engine.parallel.shards import ShardParallel
from zo_lightning.engine.parallel.tensors import broadcast_parameters

__all__ = [
    "NOT_SHARDED",
    "UNSET",
    "DataParallel",
    "Equality",
    "Exchange",
    "Mesh",
    "PeerError",
    "Processes",
    "ShardParallel",
    "UnequalRanksError",
    "as_mesh",
    "broadcast_parameters",
    "mesh_of",
]
