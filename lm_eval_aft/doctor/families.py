"""Tiny random models of common families and a tokenizer, made from configs in memory."""

from __future__ import annotations

import string
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 8}
# What to call it -> its config's class in transformers, and settings beside SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "sliding_window": 16, "sliding_window_pattern": 2}),
    "mistral (window)": ("MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": None}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "gpt2": ("GPT2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {}),
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 64}),
    "falcon": ("FalconConfig", {"alibi": False, "parallel_attn": True, "multi_query": True}),
    "mamba": ("MambaConfig", {"state_size": 8}),
}
WORDS = [*string.ascii_lowercase, *(2 * letter for letter in string.ascii_lowercase[:24])]


def tiny_model(family: str) -> Any:
    """A random model of the family, in float32 on the CPU, the same each time.

    Raises:
        LookupError: the transformers that is installed has no such family.
    """
    import transformers

    name, extra = FAMILIES[family]
    make = getattr(transformers, name, None)
    if make is None:
        raise LookupError(f"transformers has no {name}")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(make(**{**SIZES, **extra}))
    with torch.no_grad():  # fresh weights are so small that every answer looks alike
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model.float().eval()


def tokenizer() -> Any:
    """A tokenizer whose tokens are the words in `WORDS` and the space between two."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", " ", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
