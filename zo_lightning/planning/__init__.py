"""What a run will need, before it is started: which mode of the engine fits, its peak memory, the bytes that it moves and its time.

`plan(model, inputs, forward, machine)` takes any module on the meta device; `python -m zo_lightning.plan` makes one of a configuration.
"""

from zo_lightning.planning.forward import Pass, Stretch, trace
from zo_lightning.planning.machine import Machine, measured_flops
from zo_lightning.planning.modes import Mode, Plan, plan
from zo_lightning.planning.sizes import parse_size
from zo_lightning.planning.weights import Weights

__all__ = ["Machine", "Mode", "Pass", "Plan", "Stretch", "Weights", "measured_flops", "parse_size", "plan", "trace"]
