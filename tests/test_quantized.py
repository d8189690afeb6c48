"""Scales of quantized weights as trained parameters: against a naive reference, with everything else of the engine, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine_models import same
from peft_tools import SHAPES, batch_of, logits
from quantized_tools import CONFIGS, integers, quantized, scales
from reference.noise import query_seed, whole
from torch import Tensor, nn
from torchao.quantization import quantize_

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.parameters import Scale, names_of
from zo_lightning.engine.residency import Offload
from zo_lightning.engine.trajectory import Trajectory, replay
from zo_lightning.engine.trajectory.fingerprint import frozen_fingerprint
from zo_lightning.quantized import has_scales, load_scales, release_scales, save_scales, train_scales

pytestmark = pytest.mark.filterwarnings("ignore:lr=.*:zo_lightning.engine.messages.ZOWarning")


def made(shape: str = "llama", bits: str = "int4", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = quantized(shape, bits, dtype)
    train_scales(model, **options)
    return model.train()


def loss_of(model: Any, shape: str = "llama") -> Any:
    return lambda: model(**batch_of(shape)).loss


def steps(model: Any, shape: str = "llama", count: int = 3, **options: Any) -> ZOOptimizer:
    optimizer = ZOOptimizer(model, **{"lr": 1e-2, "eps": 1e-2, "safeguard": None, **options})
    for _ in range(count):
        optimizer.step(loss_of(model, shape))
    return optimizer


def by_hand(model: Any, shape: str, count: int, lr: float, eps: float, clip: float = 100.0, **more: Any) -> dict[str, Tensor]:
    """s + eps u z and max(least, s - lr g u z), written from the documentation."""
    canonical, trained = names_of(model), {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step in range(count):
        seed = query_seed(0, step, 0)
        begun = {name: p.detach().clone() for name, p in trained.items()}
        z = {
            name: torch.from_numpy(whole("rademacher", seed, canonical[id(p)], p.numel())).view(p.shape).to(p.dtype)
            for name, p in trained.items()
        }
        losses = []
        for sign in (1, -1):
            for name, p in trained.items():
                p.data = begun[name] + sign * eps * p.unit * z[name]
            with torch.no_grad():
                losses.append(float(loss_of(model, shape)()))
        g = max(-clip, min(clip, (losses[0] - losses[1]) / (2 * eps)))
        for name, p in trained.items():
            p.data = (begun[name] - lr * g * p.unit * z[name]).clamp(min=p.least)
    return scales(model)


@pytest.mark.parametrize("bits", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_trains_as_by_hand(shape: str, bits: str) -> None:
    model = made(shape, bits)
    before, kept, trained = logits(model, shape), integers(model), scales(model)
    assert torch.equal(before, logits(quantized(shape, bits), shape))
    assert len(kept) == len(trained) == len({name for name in trained if name.endswith(".weight_scale")})
    expected = by_hand(made(shape, bits), shape, 3, 1e-2, 1e-2)
    optimizer = steps(model, shape)
    for name, value in scales(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)
        assert not torch.equal(value, trained[name])
    assert same(integers(model), kept)
    assert not torch.equal(logits(model, shape), before)
    assert optimizer.report is not None


@pytest.mark.parametrize("bits", CONFIGS)
def test_units_are_powers_of_two_near_the_mean(bits: str) -> None:
    for name, p in made("opt", bits).named_parameters():
        if p.requires_grad:
            assert math.log2(p.unit) == round(math.log2(p.unit))
            assert 2**-0.51 < float(p.detach().mean()) / p.unit < 2**0.51, name
            assert 0 < p.least <= 1e-7


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residencies_agree_and_no_scale_falls_below_the_floor(weights: str, dtype: torch.dtype) -> None:
    model = made(bits="int8", dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.least = 0.9 * float(p.detach().min())
    kept = {name: p.least for name, p in model.named_parameters() if p.requires_grad}
    steps(model, lr=3.0, weights=weights)
    other = copy.deepcopy(model)
    assert {name: p.least for name, p in other.named_parameters() if p.requires_grad} == kept
    values = scales(model)
    assert all(float(value.min()) >= kept[name] * 0.99 for name, value in values.items())
    touched = sum(int((value <= kept[name] * 1.01).sum()) for name, value in values.items())
    assert touched > 3  # the bound was needed
    reference = made(bits="int8", dtype=dtype)
    for name, p in reference.named_parameters():
        if p.requires_grad:
            p.least = kept[name]
    steps(reference, lr=3.0, weights="exact")
    if weights == "inplace":
        for name, value in scales(reference).items():
            torch.testing.assert_close(value, values[name], rtol=1e-3 if dtype == torch.float32 else 2e-2, atol=0)
    else:
        assert same(scales(reference), values)


def test_defaults_are_said(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = ZOOptimizer(made())
    assert (optimizer.rule.clip, optimizer.eps, optimizer.param_groups[0]["lr"]) == (100.0, 1e-2, 1e-3)
    assert ZOOptimizer(made(), clip=5.0).rule.clip == 5.0
    assert ZOOptimizer(nn.Linear(2, 2)).rule.clip is None


MASKS = {"random": Mask("random", 0.5), "small": Mask("small_weights", 0.25), "lists": Mask("small_weights", 0.05, refresh=2)}


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "queries", *MASKS])
@pytest.mark.parametrize("weights", ["exact", "inplace"])
def test_a_step_log_replays_to_the_bit(kind: str, weights: str, tmp_path: Path) -> None:
    """Through the floor, too; the log has units and floors of its own, so that plain tensors do for a replay."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = made(bits="int8", dtype=dtype)
    for p in model.parameters():
        if p.requires_grad:
            p.least = 0.9 * float(p.detach().min())
    options: dict[str, Any] = {"mask": MASKS.get(kind), "estimator": SPSA(3) if kind == "queries" else None}
    optimizer = ZOOptimizer(model, lr=3.0, eps=1e-2, weights=weights, safeguard=None, **options)
    plain = {names_of(model)[id(p)]: p.detach().clone() for p in model.parameters() if p.requires_grad}
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    for _ in range(5):
        optimizer.step(loss_of(model))
    log.end(optimizer)
    log.close(optimizer)
    replay(plain, log.path)
    assert same(plain, {names_of(model)[id(p)]: p.detach() for p in model.parameters() if p.requires_grad})


def test_a_log_without_scales_has_no_word_of_them(tmp_path: Path) -> None:
    """Logs of before are read, and written, as they were."""
    optimizer = ZOOptimizer(nn.Linear(2, 2), lr=1e-3)
    log = Trajectory(tmp_path)
    log.begin(optimizer)
    log.close(optimizer)
    assert b'"unit"' not in log.path.read_bytes()
    assert b'"least"' not in log.path.read_bytes()


@pytest.mark.parametrize("kind", MASKS)
def test_masks_leave_the_other_scales_alone(kind: str) -> None:
    model = made()
    before = scales(model)
    optimizer = steps(model, mask=MASKS[kind])
    moved = sum(int((value != before[name]).sum()) for name, value in scales(model).items())
    density = optimizer.masks.mask.density  # type: ignore[union-attr]
    assert 0 < moved <= 1.6 * float(density) * sum(value.numel() for value in before.values())  # type: ignore[arg-type]


def test_accumulation_and_state_dicts() -> None:
    model = made()
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-2)
    for _ in range(2):
        optimizer.estimate(loss_of(model), weight=0.5)
    optimizer.apply()
    other = made()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again = ZOOptimizer(other, lr=1e-2, eps=1e-2)
    again.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (other, again)):
        its.step(loss_of(one))
    assert same(scales(model), scales(other))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))


@pytest.mark.parametrize("how", ["deepcopy", "to"])
def test_a_copied_or_moved_model_computes_with_its_own_scales(how: str) -> None:
    model = made()
    other = copy.deepcopy(model) if how == "deepcopy" else model.to("cpu")
    steps(other)
    if how == "deepcopy":
        assert same(scales(model), scales(made()))
    kept = logits(other, "llama")
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    assert not torch.equal(logits(other, "llama"), kept)


def test_scales_that_were_replaced_are_no_longer_trained_and_that_is_an_error() -> None:
    model = made()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with pytest.raises(
        RuntimeError, match=r"'weight_scale' of Linear is not what is trained any more: it was replaced .*train_scales\(model\) again"
    ):
        loss_of(model)()


def test_a_weight_that_was_quantized_again_has_other_scales() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_(model, CONFIGS["int8"])
    train_scales(model)
    model[0].weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    rows, expected = torch.eye(32), model[0].weight.t() + model[0].bias
    quantize_(model[0], CONFIGS["int8"])
    with pytest.raises(RuntimeError, match=r"'weight_scale' of Linear is not what is trained any more: its weight was replaced"):
        model[0](rows)
    assert train_scales(model) == ["0.weight_scale", "1.weight_scale"]
    torch.testing.assert_close(model[0](rows), expected, rtol=0, atol=0.02)
    model[0].weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    assert train_scales(model) == ["1.weight_scale"]  # nothing is left of the other one
    torch.testing.assert_close(model[0](rows), model[0].weight.t() + model[0].bias)


def test_an_optimizer_goes_on_after_a_model_was_released() -> None:
    model, other = made(), made()
    optimizer, its = (ZOOptimizer(one, lr=1e-2, weights="exact") for one in (model, other))
    for step in range(4):
        if step == 2:
            release_scales(model)
            train_scales(model)
        for one, run in ((model, optimizer), (other, its)):
            run.step(loss_of(one))
    assert same(scales(model), scales(other))


def test_files_are_of_the_parameters_also_where_the_weight_has_others(tmp_path: Path) -> None:
    """A cast makes new scales inside of a weight, until the next forward pass binds them."""
    model = made()
    save_scales(model, tmp_path / "s")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(2)
    model.double().float()
    load_scales(model, tmp_path / "s")
    assert torch.equal(logits(model, "llama"), logits(made(), "llama"))


def test_the_base_of_a_log_is_everything_that_is_not_trained() -> None:
    model = made(exclude=["lm_head*"])
    optimizer = ZOOptimizer(model)
    first = frozen_fingerprint(model, optimizer.residency.trained)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight_scale.mul_(2)
    assert frozen_fingerprint(model, optimizer.residency.trained) == first
    for change in (model.lm_head.weight.scale, model.lm_head.weight.qdata):
        change.mul_(0)
        now = frozen_fingerprint(model, optimizer.residency.trained)
        assert now != first
        first = now


# ---- files


@pytest.mark.parametrize("bits", CONFIGS)
def test_scales_are_saved_alone(bits: str, tmp_path: Path) -> None:
    model = made("bert", bits, also=["classifier.bias"])
    steps(model, "bert")
    save_scales(model, tmp_path / "scales.safetensors")
    whole_model = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "scales.safetensors").stat().st_size < whole_model / 4
    for other in (quantized("bert", bits), made("bert", bits)):  # an untrained one, and one whose scales are parameters
        load_scales(other, tmp_path / "scales.safetensors")
        assert torch.equal(logits(other, "bert"), logits(model, "bert"))


def test_releasing_gives_the_packages_own_model_back() -> None:
    model = made()
    steps(model)
    expected, keys = logits(model, "llama"), set(quantized().state_dict())
    release_scales(model)
    assert not has_scales(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model, "llama"), expected)
    assert not any(isinstance(value, nn.Parameter) for w in model.parameters() for value in vars(w).values())
    train_scales(model)
    assert torch.equal(logits(model, "llama"), expected)


FILES = {
    "another model": (lambda: made("bert"), r"is in the (model|file) alone"),
    "other groups": (lambda: made(bits="int8"), r"has shape \(\d+, \d+\) there and \(\d+, \d+\) in the model"),
    "another dtype": (lambda: made(dtype=torch.bfloat16), r"has dtype torch.bfloat16 there and torch.float32 in the model"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    make, message = FILES[kind]
    save_scales(make(), tmp_path / "s")
    model = made()
    before = scales(model)
    with pytest.raises(ValueError, match=message):
        load_scales(model, tmp_path / "s")
    assert same(scales(model), before)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_scales(made(), tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        load_scales(made(), tmp_path / "none")
    with pytest.raises(ValueError, match="Linear has no quantized layers"):
        save_scales(nn.Linear(2, 2), tmp_path / "s")


# ---- which scales


def test_what_is_trained() -> None:
    model = quantized("bert")
    names = train_scales(model, also=["classifier.bias", "bert.embeddings.*"], exclude=["*layer.0.*"])
    assert "classifier.bias" in names
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "bert.encoder.layer.1.attention.self.query.weight_scale" in names
    assert not any("layer.0" in name for name in names)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
    assert not any(name.endswith("query.weight") for name in train_scales(model, also=["*"]))
    ZOOptimizer(model)
    assert train_scales(model) == [name for name, p in model.named_parameters() if isinstance(p, Scale)]


def test_modules_that_share_a_weight_share_its_scales(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    quantize_(model, CONFIGS["int4"])
    model[2].weight = model[0].weight
    assert train_scales(model) == ["0.weight_scale"]
    optimizer, rows = ZOOptimizer(model, lr=0.1, weights="exact"), torch.randn(4, 32)
    for _ in range(3):
        optimizer.step(lambda: model(rows).square().mean())
    assert model[0].weight.scale is model[2].weight_scale is model[0].weight_scale
    save_scales(model, tmp_path / "s")
    load_scales(model, tmp_path / "s")


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
def test_lora_on_a_quantized_base() -> None:
    model = peft.get_peft_model(quantized(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    kept, before = integers(model), logits(model, "llama")
    steps(model.train())
    assert same(integers(model), kept)
    assert not torch.equal(logits(model, "llama"), before)


def test_streamed_weights_beside_quantized_ones() -> None:
    exact, streamed = made(), made()
    steps(exact, weights="exact")
    with steps(streamed, weights=Offload()).settled():
        assert same(scales(exact), scales(streamed))


# ---- what is refused


def test_a_model_that_is_not_quantized() -> None:
    with pytest.raises(ValueError, match=r"train_scales: Linear has no quantized layers. Quantize it first"):
        train_scales(nn.Linear(2, 2))


def test_a_quantized_tensor_that_should_be_trained() -> None:
    model = quantized()
    for p in model.parameters():
        p.requires_grad_(True)
    with pytest.raises(
        ValueError,
        match=r"is a \w+, which can't be perturbed as it is; train its scales \(zo_lightning.quantized\)",
    ):
        ZOOptimizer(model)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_not_positive(value: float) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, CONFIGS["int4"])
    model[0].weight.scale[3, 1] = value
    with pytest.raises(ValueError, match=r"'0.weight_scale': 1 of 64 values are not finite and above 0.*exclude=\['0.weight_scale'\]"):
        train_scales(model)
    assert not has_scales(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"also": ["nothing*"]}, r"Invalid also: 'nothing\*' matches none of 'model.embed_tokens.weight'"),
        ({"exclude": ["nothing*"]}, r"Invalid exclude: 'nothing\*' matches none of"),
        ({"exclude": "abc"}, r"Invalid exclude: 'abc'. It is a list of patterns: \['abc'\]"),
    ],
)
def test_patterns_that_match_nothing(options: dict[str, Any], message: str) -> None:
    model = quantized()
    with pytest.raises(ValueError, match=message):
        train_scales(model, **options)
    assert not has_scales(model)
