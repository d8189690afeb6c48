"""PrefixInit: the model with its virtual tokens is the model behind real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_tools import IDS, SHAPES, adapted, logits

from zo_lightning.callbacks import PrefixInit

TOKENS = [5, 9, 33]
DECODERS = ("opt", "llama", "gpt2")


def behind(model: Any, tokens: list[int]) -> torch.Tensor:
    """What the base says of the batch behind these tokens."""
    ids = torch.cat([torch.tensor([tokens]).expand(len(IDS), -1), IDS], 1)
    with torch.no_grad():
        found: torch.Tensor = model.get_base_model()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -IDS.shape[1] :]
    return found


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("shape", DECODERS)
def test_a_decoder_is_as_behind_the_tokens(shape: str, kind: str) -> None:
    model = adapted(shape, kind)
    expected = behind(model, TOKENS)
    assert not torch.allclose(logits(model, shape)[:, -IDS.shape[1] :], expected, atol=1e-3)
    PrefixInit(tokens=TOKENS).initialize(model)
    torch.testing.assert_close(logits(model, shape)[:, -IDS.shape[1] :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_begins_with_tokens_of_the_vocabulary(shape: str, kind: str, training: bool) -> None:
    """The same ones for a seed; nothing but the virtual tokens changes, and every module trains on."""
    models = [adapted(shape, kind).train(training) for _ in range(3)]
    modes = [module.training for module in models[0].modules()]
    before = {name: weight.clone() for name, weight in models[0].named_parameters()}
    changed = [PrefixInit().initialize(model, seed) for model, seed in zip(models, (3, 3, 4), strict=True)]
    assert torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[0], changed[2])
    after = dict(models[0].named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["prompt_encoder.default.embedding.weight"]
    assert [module.training for module in models[0].modules()] == modes


class Tokenizer:
    all_special_ids = (0, 1, 2)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(("text", "tokens"), [("ab", [97, 98, 97]), ("abcdef", [97, 98, 99])])
def test_a_text(text: str, tokens: list[int]) -> None:
    models = [adapted("llama", "prefix") for _ in range(2)]
    PrefixInit(text, Tokenizer()).initialize(models[0])
    PrefixInit(tokens=tokens).initialize(models[1])
    assert torch.equal(logits(models[0], "llama"), logits(models[1], "llama"))


def test_special_tokens_are_no_text() -> None:
    chosen = PrefixInit(tokenizer=Tokenizer())._tokens(adapted("llama", "prefix").get_base_model(), 5000, 0)
    assert set(chosen) == set(range(3, 120))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("LoRA", "the adapter 'default' is of the type LORA. Only virtual tokens"),
        ("p-tuning", "is of the type P_TUNING"),
        ("prefix, projected", "PREFIX_TUNING with prefix_projection=True"),
    ],
)
def test_adapters_that_have_none(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixInit().initialize(adapted("opt", kind))


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="both say what to begin with"):
        PrefixInit("a", Tokenizer(), tokens=[1])
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        PrefixInit("a")
    with pytest.raises(ValueError, match="has 2 tokens, and the adapter 3 virtual tokens"):
        PrefixInit(tokens=[4, 5]).initialize(adapted("opt", "prefix"))
    with pytest.raises(ValueError, match="the text has no tokens"):
        PrefixInit("", Tokenizer()).initialize(adapted("opt", "prefix"))
