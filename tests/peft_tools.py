"""Tiny models of five shapes, and adapters of every kind that peft can put on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

VOCABULARY = 120
IDS = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))


def _opt() -> Any:
    sizes: dict[str, Any] = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, max_position_embeddings=64, dropout=0.0, **sizes)
    )


def _llama() -> Any:
    """Two queries share a key."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gpt2() -> Any:
    still: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **still)
    )


def _bert() -> Any:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0, **sizes
        )
    )


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
        )
    )


SHAPES: dict[str, Callable[[], Any]] = {"opt": _opt, "llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5}
_TASK = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
_PROJECTIONS = {"gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}
_NORMS = {"opt": ["final_layer_norm"], "llama": ["input_layernorm"], "gpt2": ["ln_1"], "bert": ["LayerNorm"], "t5": ["layer_norm"]}


def _on(kind: type, **options: Any) -> Callable[[str], Any]:
    """An adapter of the attention's projections."""
    return lambda shape: kind(
        task_type=_TASK.get(shape, "CAUSAL_LM"), target_modules=_PROJECTIONS.get(shape, ["q_proj", "v_proj"]), **options
    )


def _before(kind: type, **options: Any) -> Callable[[str], Any]:
    """Virtual tokens before the others."""
    return lambda shape: kind(task_type=_TASK.get(shape, "CAUSAL_LM"), num_virtual_tokens=3, **options)


KINDS: dict[str, Callable[[str], Any]] = {
    "LoRA": _on(peft.LoraConfig, r=4),
    "rsLoRA": _on(peft.LoraConfig, r=4, use_rslora=True),
    "DoRA": _on(peft.LoraConfig, r=4, use_dora=True),
    "prefix": _before(peft.PrefixTuningConfig),
    "prefix, projected": _before(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16),
    "prompt": _before(peft.PromptTuningConfig),
    "p-tuning": _before(peft.PromptEncoderConfig, encoder_hidden_size=16),
    "IA3": lambda shape: peft.IA3Config(task_type=_TASK.get(shape, "CAUSAL_LM")),
    "LoHa": _on(peft.LoHaConfig, r=4),
    "LoKr": _on(peft.LoKrConfig, r=4),
    "OFT": _on(peft.OFTConfig, oft_block_size=4),
    "VeRA": _on(peft.VeraConfig, r=4),
    "LayerNorm": lambda shape: peft.LNTuningConfig(task_type=_TASK.get(shape, "CAUSAL_LM"), target_modules=_NORMS[shape]),
}
UNSUPPORTED = {("gpt2", "LoHa"), ("gpt2", "LoKr"), ("gpt2", "OFT")}
"""peft itself has none of these for GPT-2's Conv1D."""
ALL = [(shape, kind) for shape in SHAPES for kind in KINDS if (shape, kind) not in UNSUPPORTED]


def base(shape: str, seed: int = 0) -> Any:
    """The model without an adapter; always the same for a seed."""
    torch.manual_seed(seed)
    return SHAPES[shape]().eval()


def adapted(shape: str, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same with an adapter whose values are random, so that none of its factors is zero."""
    model = peft.get_peft_model(base(shape).to(dtype), KINDS[kind](shape)).to(dtype).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def batch_of(shape: str) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    labels = torch.arange(4) % 2 if shape == "bert" else IDS
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}


@contextmanager
def _norms_and_scores_in(dtype: torch.dtype) -> Iterator[None]:
    """transformers computes norms and attention scores in float32 whatever the model has, which is too coarse for small differences."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype is torch.float64:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch, "float32", torch.float64)
        yield


def loss_of(model: Any, shape: str) -> Callable[[], torch.Tensor]:
    """The closure, in the dtype of the logits: the losses of transformers are in float32."""
    given = batch_of(shape)
    labels, dtype = given["labels"], next(model.parameters()).dtype

    def closure() -> torch.Tensor:
        with _norms_and_scores_in(dtype):
            found = model(**given).logits
        if shape == "bert":
            return F.cross_entropy(found, labels)
        found = found[:, -labels.shape[1] :] if shape == "t5" else found[:, -labels.shape[1] : -1]
        return F.cross_entropy(found.flatten(0, 1), (labels if shape == "t5" else labels[:, 1:]).flatten())

    return closure


def logits(model: Any, shape: str) -> torch.Tensor:
    """Without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model(**batch_of(shape)).logits
    return found
