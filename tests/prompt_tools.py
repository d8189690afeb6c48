"""Tiny language models of four kinds, tokenizers built in memory, and the naive scores of a prompt: each text alone, without padding."""

from __future__ import annotations

import copy
import functools
import re
import string
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

CORPUS = [
    "a great film that was really great fun to see",
    "a terrible film and a terrible waste of time",
    "it was great . it was terrible . it was fine ( great )",
    "Review: the actors were good and the story was bad\nSentiment: great",
    "great terrible fine film a b c d really good bad story",
] * 20
VOCAB = 400


def wordpiece() -> Any:
    """As BERT's: whole words, and letters for all others. Its vocabulary is written down: training draws among equal pairs."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]", line.lower())]
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    vocabulary = dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])
    built = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer()
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=built, **names)


def byte_level(kind: str = "gpt2") -> Any:
    """As GPT-2's; with kind "roberta" <s> and </s> around and a mask that takes the space before it, with "opt" </s> in front."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(CORPUS, trainer)
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="</s>", bos_token="<s>", padding_side="left")
    shape = "<s> $A </s>" if kind == "roberta" else "</s> $A"
    built.post_processor = processors.TemplateProcessing(shape, special_tokens=[("<s>", 0), ("</s>", 2)])
    found = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    if kind == "roberta":
        from tokenizers import AddedToken

        found.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    return found


def sentencepiece() -> Any:
    """As Llama's: a word and the space before it are one token; padding on the left."""
    built = Tokenizer(models.BPE(unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    built.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    built.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=built, **names)


def model(kind: str, seed: int = 0) -> Any:
    """A language model with large random weights, so that scores differ."""
    torch.manual_seed(seed)
    size = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "initializer_range": 0.3}
    sized = {**size, "intermediate_size": 32, "max_position_embeddings": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sized, **still))
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**{**sized, "max_position_embeddings": 66}, **still, pad_token_id=1, bos_token_id=0))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sized, pad_token_id=None, bos_token_id=1, eos_token_id=2))
    if kind == "opt":
        own = {"ffn_dim": 32, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.3}
        return OPTForCausalLM(OPTConfig(**{**size, **own}, pad_token_id=1, bos_token_id=2, eos_token_id=2))
    gpt2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, bos_token_id=0, eos_token_id=2, **gpt2))


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": wordpiece,
    "roberta": lambda: byte_level("roberta"),
    "gpt2": byte_level,
    "opt": lambda: byte_level("opt"),
    "llama": sentencepiece,
}


@functools.cache
def _built(kind: str) -> Any:
    return BUILDERS[kind]()


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of one's own; built once, for not every training of one comes out the same."""
    return copy.deepcopy(_built(kind))


def naive_word_scores(net: Any, tokenizer: Any, text: str, words: list[str]) -> torch.Tensor:
    """The logits of the words (their last token, as they are written there) at the mask, or behind the text."""
    ids = tokenizer(text)["input_ids"]
    at = ids.index(tokenizer.mask_token_id) if tokenizer.mask_token is not None else -1
    logits = net(torch.tensor([ids])).logits[0, at]
    return torch.stack([logits[tokenizer(f"it was {word}", add_special_tokens=False)["input_ids"][-1]] for word in words])


def naive_option_scores(net: Any, tokenizer: Any, text: str, options: list[str], mean: bool) -> torch.Tensor:
    """Log-probabilities of the options' tokens, one option at a time."""
    scores = []
    known = len(tokenizer(text)["input_ids"])
    for option in options:
        ids = tokenizer(f"{text} {option}")["input_ids"]
        logits = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [logits[i - 1, ids[i]] for i in range(known, len(ids))]
        scores.append(sum(each) / (len(each) if mean else 1))
    return torch.stack(scores)
