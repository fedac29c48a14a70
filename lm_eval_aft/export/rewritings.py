"""Rewriting families without a bias for the vector as an equivalent family that has one.

Each rewriting reads the base config, refuses what the target cannot express, and converts tensors
without loss. None is trusted: every export is reloaded and compared with the hooked model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft._util.errors import AFTError

_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("attention_dropout", "rope_parameters"),
)
_SLOT = "mlp.down_proj"


def _rewritten(
    model: Any,
    target: str,
    convert: Callable[[Tensors], Tensors],
    centred: bool = False,
    caution: str = "",
    **keys: Any,
) -> Plan:
    from transformers import AutoConfig

    config = model.config
    common = {key: copy.deepcopy(getattr(config, key)) for key in _COMMON if hasattr(config, key)}
    common["head_dim"] = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    try:
        new = AutoConfig.for_model(target, **{**common, "mlp_bias": True, **keys})
    except ValueError as error:
        raise AFTError(
            f"{config.model_type} can only be rewritten as {target}, which this transformers does not know.",
            f"Upgrade transformers. {PEFT_INSTEAD}",
        ) from error
    route = f"rewritten from {config.model_type} to {target}; the vector lies in {_SLOT}.bias"
    return Plan(new, _SLOT, 1.0, convert, route, centred, caution)


def _windowed(model: Any, layer_types: list[str] | None, convert: Callable[[Tensors], Tensors]) -> Plan:
    """Llama; or SmolLM3, its twin with sliding windows, if any block has one that matters."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    types = layer_types or ["sliding_attention"] * config.num_hidden_layers
    bias = {"attention_bias": config.model_type == "qwen2"}
    if window is None or window >= config.max_position_embeddings or "sliding_attention" not in types:
        return _rewritten(model, "llama", convert, **bias)
    return _rewritten(
        model,
        "smollm3",
        convert,
        use_sliding_window=True,
        sliding_window=window,
        layer_types=types,
        no_rope_layers=[1] * config.num_hidden_layers,
        **bias,
    )


def _phi3(model: Any) -> Plan:
    config = model.config
    rope = dict(config.rope_parameters)
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise AFTError(
            "This phi3 uses long or partial rotary embeddings, which no family with a bias in "
            "mlp.down_proj computes in the same way.",
            PEFT_INSTEAD,
        )
    config = copy.deepcopy(config)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    def split(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            if name.endswith("qkv_proj.weight"):
                sizes = [heads * width, shared * width, shared * width]
                for part, piece in zip("qkv", torch.split(tensor, sizes), strict=True):
                    yield name.replace("qkv_proj", f"{part}_proj"), piece
            elif name.endswith("gate_up_proj.weight"):
                for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{part}_proj"), piece
            else:
                yield name, tensor

    return _windowed(model, None, split)


def _qwen3(model: Any) -> Plan:
    config = model.config
    if "sliding_attention" in (config.layer_types or []):
        raise AFTError(
            "This qwen3 has sliding windows; its only twin with a bias in mlp.down_proj has none.",
            PEFT_INSTEAD,
        )
    return _rewritten(
        model,
        "hy_v3",
        unchanged,
        caution="few engines besides transformers know hy_v3; --to peft keeps the architecture",
        attention_bias=config.attention_bias,
        mlp_layer_types=["dense"] * config.num_hidden_layers,
        num_experts=None,
        num_experts_per_tok=None,
        num_shared_experts=None,
    )


def _gemma(model: Any) -> Plan:
    config = model.config

    def norms(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            if not name.endswith("norm.weight"):
                yield name, tensor
                continue
            # Gemma multiplies by 1 + weight, others by weight.
            weight = (1.0 + tensor.double()).to(tensor.dtype)
            _require_lossless(1.0 + tensor.double(), weight, "gemma", "1 + the norms' weights")
            yield name, weight

    return _rewritten(
        model,
        "granite",
        norms,
        attention_bias=config.attention_bias,
        hidden_act=getattr(config, "hidden_activation", None) or config.hidden_act,
        embedding_multiplier=math.sqrt(config.hidden_size),
        attention_multiplier=(config.head_dim or config.hidden_size // config.num_attention_heads) ** -0.5,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )


def _olmo(model: Any) -> Plan:
    config = model.config
    if config.clip_qkv is not None:
        raise AFTError("This olmo clips its queries and keys; no family with a bias does.", PEFT_INSTEAD)

    def centre(tensors: Tensors) -> Tensors:
        # A LayerNorm without weights equals an RMSNorm once nothing written to the residual stream has a
        # mean. The head reads normalised states, whose mean is 0: it may stay tied to the embedding.
        for name, tensor in tensors:
            if not name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "o_proj.bias")):
                yield name, tensor
                continue
            axis = -1 if name.endswith("embed_tokens.weight") else 0
            exact = tensor.double() - tensor.double().mean(axis, keepdim=True)
            rounded = exact.to(tensor.dtype)
            _require_lossless(exact, rounded, "olmo", "weights without their mean")
            yield name, rounded
        ones = torch.ones(config.hidden_size, dtype=model.dtype)
        yield "model.norm.weight", ones
        for layer in range(config.num_hidden_layers):
            yield f"model.layers.{layer}.input_layernorm.weight", ones.clone()
            yield f"model.layers.{layer}.post_attention_layernorm.weight", ones.clone()

    return _rewritten(
        model, "llama", centre, centred=True, attention_bias=config.attention_bias, rms_norm_eps=1e-5
    )


def _require_lossless(exact: Tensor, rounded: Tensor, family: str, what: str) -> None:
    error = float((rounded.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300))
    if error > 2.0**-22:
        raise AFTError(
            f"{family} can be rewritten exactly in float32 only: {what} cannot be stored in "
            f"{str(rounded.dtype).removeprefix('torch.')} (error {error:.0e}).",
            PEFT_INSTEAD,
        )


REWRITINGS: dict[str, Callable[[Any], Plan]] = {
    "qwen2": lambda model: _windowed(model, list(model.config.layer_types), unchanged),
    "mistral": lambda model: _windowed(model, None, unchanged),
    "phi3": _phi3,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "olmo": _olmo,
}
NO_FAMILY = {
    "stablelm": (
        "no family with one has its LayerNorms with biases, partial rotary embeddings and gated MLP"
    ),
    "mpt": "no family with one has its ALiBi attention without biases",
}


# How a plain checkpoint will hold a vector.

Tensors = Iterator[tuple[str, Tensor]]

PEFT_INSTEAD = "Use --to peft, which adds the vector without a place in the checkpoint."
HOOK_INSTEAD = "Use --to steered, or score it with `--model aft`; both add it after the block itself."


@dataclass(frozen=True)
class Plan:
    """How a checkpoint will hold the vector.

    Attributes:
        config: configuration of the export.
        slot: the Linear that gets the bias, by its name inside a block *of the export*.
        scale: how far a block's output moves per unit of that bias.
        convert: the base model's tensors to the export's; biases that are missing become zeros.
        route: it in one phrase, for the notes.
        centred: the residual stream of the export is free of its mean, so the vector must be too.
        caution: a sentence on the drawback of this route, or ``""``.
    """

    config: Any
    slot: str
    scale: float
    convert: Callable[[Tensors], Tensors]
    route: str
    centred: bool = False
    caution: str = ""


def unchanged(tensors: Tensors) -> Tensors:
    """The conversion that changes nothing."""
    yield from tensors


def skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A meta-device causal LM of this config: it takes no memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
