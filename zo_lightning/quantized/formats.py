"""Where the packages that quantize weights keep the numbers that scale their integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Format(ABC):
    """The quantized layers of one package. It has no state: a module brings everything, and no package need be installed."""

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether a module is such a layer. ValueError for one that is, and does not compute with its scales."""

    @abstractmethod
    def scales(self, module: nn.Module) -> dict[str, Tensor]:
        """The scales as the module has them, by the name that a parameter of them gets in the module."""

    def zero_points(self, module: nn.Module) -> dict[str, Tensor]:
        """Zero points that are floating point numbers, likewise; integers can't be trained."""
        return {}

    @abstractmethod
    def put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Let the module compute with this tensor from now on; it may be moved (`.data`) between forward passes."""

    def holder(self, module: nn.Module, name: str) -> object:
        """What must be the same object as long as the scales are those of these integers; None where this can't be seen."""
        return None

    def release(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Let the module compute with this tensor as it did before there was a parameter of that name."""
        self.put(module, name, tensor)


class TorchAO(Format):
    """torchao: a weight is a tensor subclass with integers (`qdata`), `scale` and perhaps `zero_point` inside."""

    parts: ClassVar[dict[str, bool]] = {"scale": True, "zero_point": False}
    """Attributes of a weight, and whether they are scales."""

    def fits(self, module: nn.Module) -> bool:
        return any(True for _ in self._inside(module))

    def scales(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: getattr(weight, part) for name, weight, part in self._inside(module) if self.parts[part]}

    def zero_points(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: getattr(weight, part) for name, weight, part in self._inside(module) if not self.parts[part]}

    def put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        for own, weight, part in self._inside(module):
            if own == name and getattr(weight, part) is not tensor:
                setattr(weight, part, self.part_of(tensor))

    def holder(self, module: nn.Module, name: str) -> object:
        return module._parameters.get(name.rpartition("_")[0] if name.endswith("_scale") else name.removesuffix("_zero_point"))

    def part_of(self, tensor: Tensor) -> Tensor:
        """What a weight can have inside."""
        return tensor

    def _inside(self, module: nn.Module) -> Iterator[tuple[str, Any, str]]:
        for name, weight in module._parameters.items():
            if weight is not None and is_traceable_wrapper_subclass(weight):
                for part in self.parts:
                    found = vars(weight).get(part)
                    if isinstance(found, Tensor) and found.is_floating_point():
                        yield f"{name}_{part.strip('_')}", weight, part


class Quanto(TorchAO):
    """optimum-quanto: the same with `_scale` and `_shift`, a floating point zero point: w = scale q - shift for 2 and 4 bits."""

    parts: ClassVar[dict[str, bool]] = {"_scale": True, "_shift": False}

    def holder(self, module: nn.Module, name: str) -> object:
        return None  # it makes a new weight when it loads one

    def part_of(self, tensor: Tensor) -> Tensor:
        return tensor.detach()  # its weights can't be flattened with a parameter inside


class BitsAndBytes4(Format):
    """bitsandbytes nf4 and fp4: w = absmax code[q], with an absmax a block of 64. Doubly quantized ones become float32 numbers."""

    def fits(self, module: nn.Module) -> bool:
        return hasattr(getattr(module._parameters.get("weight"), "quant_state", None), "absmax")

    def scales(self, module: nn.Module) -> dict[str, Tensor]:
        state = self._state(module)
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
            state.nested, state.state2, state.offset = False, None, None
        return {"weight_absmax": state.absmax}

    def put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        layer: Any = module
        state = self._state(module)
        if state.absmax is not tensor:
            state.absmax = tensor
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False  # this kernel keeps a copy of its own

    def _state(self, module: Any) -> Any:
        return module.weight.quant_state


class BitsAndBytes8(Format):
    """bitsandbytes int8: w = SCB q / 127, with a scale a row. It is at the weight until the first forward pass, then in `state`."""

    def fits(self, module: nn.Module) -> bool:
        return self._owner(module) is not None

    def scales(self, module: nn.Module) -> dict[str, Tensor]:
        return {"SCB": self._owner(module).SCB}

    def put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        owner = self._owner(module)
        if owner.SCB is not tensor:
            owner.SCB = tensor

    def _owner(self, module: nn.Module) -> Any:
        places = (getattr(module, "state", None), module._parameters.get("weight"))
        return next((one for one in places if isinstance(getattr(one, "SCB", None), Tensor)), None)


class Packed(Format):
    """GPTQ and AWQ: the module has packed integers `qweight`, integer zero points `qzeros`, and `scales` by their own name."""

    kinds = ("TorchLinear", "TorchQuantLinear", "QuantLinear", "AwqTorchLinear", "WQLinear_GEMM")
    """Those that read `scales` in every forward pass; kernels of others keep a form of their own."""

    def fits(self, module: nn.Module) -> bool:
        tensors = {**module._buffers, **module._parameters}
        fits = tensors.get("qweight") is not None and tensors.get("scales") is not None
        if fits and type(module).__name__ not in self.kinds:
            raise ValueError(
                f"{type(module).__name__} keeps the scales of its weights in a form of its own. Load the model with backend='torch' "
                f"(GPTQConfig, AwqConfig); scales can be trained in {', '.join(self.kinds)}."
            )
        return fits

    def scales(self, module: nn.Module) -> dict[str, Tensor]:
        scales: Any = module.scales
        return {"scales": scales}

    def put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """The module has it by its name."""

    def release(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        module.register_buffer(name, tensor)


FORMATS: tuple[Format, ...] = (TorchAO(), Quanto(), BitsAndBytes4(), BitsAndBytes8(), Packed())


def format_of(module: nn.Module) -> Format | None:
    """The format of a module's own weights; None where they are not quantized."""
    return next((one for one in FORMATS if one.fits(module)), None)
