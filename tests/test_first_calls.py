"""MKL's vector functions are called once, on one element and so on one thread, before a call of them matters."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode

seen = []

class Record(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [part for part in arguments if isinstance(part, torch.Tensor)]
        seen.extend((function.__name__.partition(".")[0], str(t.dtype)[6:], t.device.type, t.numel()) for t in tensors)
        return result

torch.set_default_device("meta")
with Record():
    import zo_lightning.engine
print(json.dumps(seen))
"""
TAKEN_FROM_MKL = "acos asin atan cos erf erfc erfinv exp log log10 log2 sin sqrt tan tanh".split()
"""ATen/cpu/vml.h, less `trunc`, which has no versions that differ."""


def test_importing_the_engine_makes_the_first_calls() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    seen = [tuple(call) for call in json.loads(done.stdout)]
    for name in TAKEN_FROM_MKL:
        for dtype in ("float32", "float64"):
            first = next((call for call in seen if call[:2] == (name, dtype)), None)
            assert first == (name, dtype, "cpu", 1)
