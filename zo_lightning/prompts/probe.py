"""A linear probe: the head of a model in closed form, from one pass over data, as a start for forward-only training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import check_number
from zo_lightning.prompts.heads import LOADED

LEAST_RESIDUAL = 0.05
"""The share of the targets' variance that a classifier's scale takes for unexplained at least: small data is fitted too well."""


@dataclass(frozen=True)
class Probe:
    """What was done: to which head, from how many rows, and the share of the targets' variance that its fit explains."""

    head: str
    rows: int
    explained: float


@torch.no_grad()
def linear_probe(
    model: nn.Module,
    dataloader: Iterable[Any],
    head: str | nn.Linear | None = None,
    *,
    ridge: float = 1e-2,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    target: Callable[[Any], Tensor] | None = None,
) -> Probe:
    """Write the ridge regression of the targets on the features that reach a Linear head into it, in one pass without gradients.

        W = (X'X + ridge tr(X'X)/d I)^-1 X'Y,   b = mean(y) - W mean(x)

    in float64, with X (rows, d) and Y centred; a head without bias gets neither centred X nor b. Classes are one-hot minus 1 / classes, and
    their W and b are scaled by classes / (1 - R^2), R^2 the explained share of the variance (at most 0.95): for two classes of equal size
    that is the linear discriminant, so that the cross entropy begins near its least. Integer targets (rows,) are classes, floating point
    targets, (rows,) or (rows, outputs), a regression; rows with a target of -100 are left out.

    It runs in evaluation mode and touches nothing but the head. Do it before training, as any other loading of weights. In several
    processes each needs the same data.

    Args:
        model: any module. A head that scores every token of a row (decoders) is fitted to the tokens whose scores the model returns.
        dataloader: dicts with "labels", or pairs (input, target).
        head: the nn.Linear, or its name; None: the last one outside of a pretrained body, or the last of all.
        ridge: of the mean variance of the features.
        forward: (model, batch) -> outputs, where model(**batch without labels), or model(input), is not it.
        target: batch -> targets.

    Raises ValueError where there is no such head, no data, a target that the head has no output for, or an output that is not the head's.
    """
    check_number("ridge", ridge, ">= 0", lambda x: x >= 0)
    name, linear = _head(model, head)
    sums: Moments | None = None
    device = linear.weight.device
    with _evaluating(model):
        for batch in dataloader:
            batch = _on(batch, device)
            wanted = target(batch) if target is not None else _target(batch)
            features = _features(model, linear, name, functools.partial(forward or _run, model, batch))
            x, y, classes = _rows(features, wanted, linear.out_features, name)
            sums = sums or Moments(linear.in_features, linear.out_features, classes, device)
            if sums.classes != classes:
                raise ValueError("The targets are integers in some batches and not in others.")
            sums.add(x, y)
    if sums is None or not sums.count:
        raise ValueError("linear_probe: the dataloader has no rows with a target.")
    weight, bias, explained = sums.solve(ridge, with_bias=linear.bias is not None)
    linear.weight.copy_(weight)
    setattr(linear.weight, LOADED, True)  # it is no longer new, see heads.py
    if linear.bias is not None:
        linear.bias.copy_(bias)
        setattr(linear.bias, LOADED, True)
    return Probe(name, sums.count, explained)


class Moments:
    """Sums over rows of x, y and their products, float64."""

    def __init__(self, features: int, outputs: int, classes: bool, device: torch.device) -> None:
        kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}
        self.count, self.classes = 0, classes
        self.x, self.y = torch.zeros(features, **kind), torch.zeros(outputs, **kind)
        self.xx, self.xy, self.yy = torch.zeros(features, features, **kind), torch.zeros(features, outputs, **kind), 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows (n, features) and (n, outputs)."""
        x, y = x.to(self.x), y.to(self.y)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.square().sum())

    def solve(self, ridge: float, with_bias: bool) -> tuple[Tensor, Tensor, float]:
        """(W, b, explained share)."""
        n = self.count
        mean_x, mean_y = (self.x / n, self.y / n) if with_bias else (torch.zeros_like(self.x), torch.zeros_like(self.y))
        xx, xy = self.xx - n * torch.outer(mean_x, mean_x), self.xy - n * torch.outer(mean_x, mean_y)
        total = self.yy - n * float(mean_y.square().sum())
        eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        regular = xx + ridge * float(xx.trace()) / len(xx) * eye
        # without a ridge, features that are constant or sums of others leave a choice: the smallest W
        weight = torch.linalg.solve(regular, xy) if ridge and xx.any() else torch.linalg.pinv(regular, hermitian=True) @ xy
        left = total - 2 * float((weight * xy).sum()) + float((weight * (xx @ weight)).sum())
        explained = 1 - left / total if total > 0 else 0.0
        bias = mean_y - mean_x @ weight
        scale = len(mean_y) / max(1 - explained, LEAST_RESIDUAL) if self.classes else 1.0
        return scale * weight.T, scale * bias, explained


def _head(model: nn.Module, head: str | nn.Linear | None) -> tuple[str, nn.Linear]:
    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name}
    if isinstance(head, nn.Module):
        found = next((name for name, part in linears.items() if part is head), None)
    elif head is not None:
        found = head if head in linears else None
    else:
        body = {id(part) for outer in model.modules() for part in _body(outer)}
        found = next((name for name in reversed(linears) if id(linears[name]) not in body), None)
    if found is None:
        which = "no Linear head" if head is None else f"no Linear called {head!r}" if isinstance(head, str) else "not this head"
        raise ValueError(
            f"linear_probe: {type(model).__name__} has {which}. Its Linear modules: {', '.join(list(linears)[-8:]) or 'none'}."
        )
    return found, linears[found]


def _body(outer: nn.Module) -> list[nn.Module]:
    prefix = getattr(outer, "base_model_prefix", "")
    body = getattr(outer, prefix, None) if isinstance(prefix, str) and prefix and hasattr(outer, "config") else None
    return list(body.modules()) if isinstance(body, nn.Module) and body is not outer else []


def _features(model: nn.Module, linear: nn.Linear, name: str, run: Callable[[], Any]) -> Tensor:
    """What reaches the head, (rows, features). Of a head that is applied to every token, the one whose score the model returns: it is
    told from scores that are drawn for each token and output, so that no mean or maximum of tokens is taken for one of them."""
    seen: list[Tensor] = []
    drawn: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        seen.append(args[0].detach())
        if args[0].dim() != 3:
            return None
        drawn.append(torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(0)).to(output.device))
        return drawn[-1].expand(output.shape).clone()

    handle = linear.register_forward_hook(look)
    try:
        outputs = run()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"linear_probe: the head {name!r} is used {len(seen)} times in a forward pass, not once.")
    features = seen[0]
    if features.dim() == 2:
        return features
    found: Any = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    found = found[0] if isinstance(found, (tuple, list)) else found
    alike = drawn and isinstance(found, Tensor) and tuple(found.shape) == (len(features), linear.out_features)
    matches = (found[:, None] == drawn[0].to(found)).all(-1) if alike else None  # (rows, tokens)
    if matches is None or not bool(matches.any(1).all()):
        raise ValueError(
            f"linear_probe: the head {name!r} gets {tuple(features.shape)}, and what the model returns is not its score of one token a row."
        )
    return features[torch.arange(len(features), device=features.device), matches.int().argmax(1)]


def _rows(x: Tensor, wanted: Any, outputs: int, name: str) -> tuple[Tensor, Tensor, bool]:
    """(features, targets as the head should give them, whether they are classes) of the rows that have a target."""
    wanted = torch.as_tensor(wanted, device=x.device)
    classes = not wanted.is_floating_point()
    if len(wanted) != len(x) or wanted.dim() > 2 or (classes and wanted.dim() != 1):
        raise ValueError(
            f"linear_probe: targets of shape {tuple(wanted.shape)} for {len(x)} rows. Must be one class, or {outputs} numbers, a row."
        )
    if not classes:
        y = wanted.reshape(len(x), -1)
        if y.shape[1] != outputs:
            raise ValueError(f"linear_probe: the targets have {y.shape[1]} numbers a row, and the head {name!r} {outputs} outputs.")
        return x, y, False
    x, wanted = x[wanted != -100], wanted[wanted != -100].long()
    if outputs < 2 or bool(((wanted < 0) | (wanted >= outputs)).any()):
        worst = f"{int(wanted.min())} to {int(wanted.max())}" if len(wanted) else "none"
        raise ValueError(
            f"linear_probe: classes {worst}, and the head {name!r} has {outputs} outputs. For a regression, give floating point targets."
        )
    return x, torch.nn.functional.one_hot(wanted, outputs).double() - 1 / outputs, True


def _target(batch: Any) -> Any:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    raise ValueError(f"linear_probe: a batch is a {type(batch).__name__} without labels. Give dicts with 'labels', pairs, or target=.")


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0])


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(value, device) for name, value in batch.items()}
    return [_on(value, device) for value in batch] if isinstance(batch, (tuple, list)) else batch


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
