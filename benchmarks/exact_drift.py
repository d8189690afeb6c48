"""Whether weights="exact" leaves every bit of the weights: over steps without update, exceptions at every border, and its scratch memory.

python benchmarks/exact_drift.py                        1,000 steps, five models, three dtypes
python benchmarks/exact_drift.py --steps 30 --models opt t5 --dtypes bfloat16
python benchmarks/exact_drift.py --memory --json out.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from measure import environment, write
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from zo_lightning import ZOOptimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
VOCABULARY = 120


class Shape(NamedTuple):
    """A model type of transformers, made small."""

    kind: str
    head: Any
    sizes: dict[str, Any]


_COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
MODELS: dict[str, Shape] = {
    "opt": Shape("opt", AutoModelForCausalLM, {**_COMMON, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "llama": Shape("llama", AutoModelForCausalLM, {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}),
    "bert": Shape("bert", AutoModelForMaskedLM, {**_COMMON, "intermediate_size": 64}),
    "t5": Shape("t5", AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}),
    "gpt2": Shape("gpt2", AutoModelForCausalLM, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
}


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model with random weights, the same each time, and its loss on one batch."""
    torch.manual_seed(0)
    shape = MODELS[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(shape.kind, vocab_size=VOCABULARY, **shape.sizes, **tokens)
    model = shape.head.from_config(config, dtype=dtype).train()
    ids = torch.randint(3, VOCABULARY, (2, 12))

    def loss() -> Tensor:
        logits = model(input_ids=ids, labels=ids).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    return model, loss


class Weights:
    """The bits and the places of a model's weights at the start."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = [weight.data_ptr() for weight in model.parameters()]
        self._bits = [_bits(weight).clone() for weight in model.parameters()]

    def changed(self) -> int:
        """How many elements are not what they were; all of a tensor that is not where it was."""
        rows = zip(self._model.parameters(), self._places, self._bits, strict=True)
        return sum(weight.numel() if weight.data_ptr() != place else int((_bits(weight) != was).sum()) for weight, place, was in rows)


def _bits(weight: Tensor) -> Tensor:
    return weight.detach().view(INTEGERS[weight.element_size()])


class ThrownError(Exception):
    """What is thrown at a border."""


def borders(model: nn.Module, units: Sequence[nn.Module]) -> Iterator[tuple[str, Callable[[BaseException], Callable[[], None]]]]:
    """(name, function that has an error thrown there and returns what ends that): before, inside and after the forward of each unit."""

    names = {module: name or "model" for name, module in model.named_modules()}
    for unit in dict.fromkeys([*units, model]):
        name = names[unit]
        yield f"{name} pre-hook", partial(_hooked, unit.register_forward_pre_hook)
        yield f"{name} first pre-hook", partial(_hooked, unit.register_forward_pre_hook, prepend=True)
        yield f"{name} inside", partial(_hooked, list(unit.modules())[-1].register_forward_hook)
        yield f"{name} forward", partial(_shadow, unit)
        yield f"{name} forward hook", partial(_hooked, unit.register_forward_hook)
        yield f"{name} last hook", partial(_hooked, unit.register_forward_hook, always_call=True)


def _throw(error: BaseException) -> Callable[..., None]:
    def now(*args: Any, **kwargs: Any) -> None:
        raise error

    return now


def _hooked(register: Callable[..., Any], error: BaseException, **options: bool) -> Callable[[], None]:
    remove: Callable[[], None] = register(_throw(error), **options).remove
    return remove


def _shadow(module: nn.Module, error: BaseException) -> Callable[[], None]:
    module.forward = _throw(error)
    return lambda: delattr(module, "forward")


def throw_at_borders(optimizer: ZOOptimizer, model: nn.Module, loss: Callable[[], Tensor], weights: Weights) -> dict[str, int]:
    """An exception, and a KeyboardInterrupt, at every border in turn: how many were thrown, came out, and left a weight changed."""
    ran: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: ran.add(module)) for module in model.modules()]
    optimizer.step(loss)  # the watched pass is over: what is thrown meets an evaluation
    for hook in hooks:
        hook.remove()
    units = [unit.module for unit in getattr(optimizer.residency, "units", []) if unit.module in ran]
    result = {"borders": 0, "thrown": 0, "changed": 0}
    for _, arrange in borders(model, units):
        result["borders"] += 1
        for error in (ThrownError(), KeyboardInterrupt()):
            undo = arrange(error)
            try:
                optimizer.step(loss)
            except (ThrownError, KeyboardInterrupt) as caught:
                result["thrown"] += caught is error
            undo()
            result["changed"] += weights.changed()
    return result


def drift(name: str, dtype: str, steps: int, weights: str) -> dict[str, Any]:
    """`steps` steps without update, with exceptions at every border before and after them."""
    model, loss = make(name, DTYPES[dtype])
    start = Weights(model)
    optimizer = ZOOptimizer(model, lr=0.0, weights=weights, safeguard=None)
    before = throw_at_borders(optimizer, model, loss, start)
    differences = 0
    for _ in range(steps):
        optimizer.step(loss)
        report = optimizer.report
        differences += report is not None and not report.zero_difference
    changed = start.changed()
    after = throw_at_borders(optimizer, model, loss, start)
    return {
        **{"model": name, "dtype": dtype, "weights": weights, "steps": steps, "steps_with_a_difference": differences},
        "changed_by_steps": changed,
        **{key: before[key] + after[key] for key in before},
    }


def scratch_memory(name: str, dtype: str) -> dict[str, Any]:
    """Bytes of scratch memory after two steps, those of the largest unit, and of all that is trained."""
    model, loss = make(name, DTYPES[dtype])
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact", safeguard=None)
    for _ in range(2):
        optimizer.step(loss)
    residency: Any = optimizer.residency
    sizes = {unit: sum(p.tensor.nbytes for p in unit.parameters) for unit in residency.units}
    largest = max(sizes, key=lambda unit: sizes[unit])
    held = residency.scratch_bytes()
    trained = sum(p.tensor.nbytes for p in residency.trained)
    return {"model": name, "dtype": dtype, "scratch_bytes": held, "largest_unit_bytes": sizes[largest], "trained_bytes": trained}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--weights", choices=("exact", "copy", "inplace"), default="exact")
    parser.add_argument("--memory", action="store_true", help="scratch memory instead of drift")
    parser.add_argument("--threads", type=int, default=None, help="torch's intra-op threads; default: torch's")
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in options.models:
        for dtype in options.dtypes:
            rows.append(scratch_memory(name, dtype) if options.memory else drift(name, dtype, options.steps, options.weights))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    result = {"environment": environment("cpu"), "memory" if options.memory else "drift": rows}
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
