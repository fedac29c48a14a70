"""Which base model a vector belongs to: an identity that survives a change of dtype."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lm_eval_aft._util.errors import AFTError

logger = logging.getLogger(__name__)
# Config keys that define the computation. A positive list, because a config's other keys and
# their defaults change from one transformers release to the next.
_CONFIG_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "hidden_act",
    "activation_function",
    "sliding_window",
    "tie_word_embeddings",
    "use_parallel_residual",
    "residual_multiplier",
)
# Other settings that change what the same weights compute. Older vectors have no hash of these, so they are
# compared only where both sides have one.
_COMPUTATION_KEYS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "output_multiplier"),
    *("logits_scaling", "logit_scale", "scale_embedding", "scale_attn_weights"),
    *("scale_attn_by_inverse_layer_idx", "routed_scaling_factor", "norm_topk_prob", "num_experts_per_tok"),
    *("hidden_act", "hidden_activation", "activation_function"),
    *("rope_parameters", "rope_theta", "partial_rotary_factor", "rotary_dim", "no_rope_layers"),
)
_COMPUTATION = "settings of the computation (rotary embedding, norms, scaling, softcapping or activation)"
# Those arguments of lm-eval's `hf` that decide which weights and vocabulary a model has.
WEIGHT_ARGS = ("revision", "subfolder", "gguf_file", "peft", "delta", "tokenizer")
_ENTRIES = 16
# Weights of one model in two quantisations lie some percent of their size apart; those of models that have
# nothing in common 100 and more.
_KIN = 0.4
_COARSENESS = {"float64": 0, "float32": 0, "float16": 1, "bfloat16": 1}


def fingerprint(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """Identify a base model by its architecture, its vocabulary and a sketch of its weights.

    The sketch holds 16 evenly spaced entries of *every* parameter, in fp32: a merged LoRA may
    touch nothing but the query and value projections, so no matrix is left out.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer; without one the vocabulary is not part of the identity.

    Returns:
        JSON-serialisable: ``config``, ``computation``, ``parameters`` and ``vocabulary`` (SHA-256 each,
        the last possibly ``None``), ``dtype``, ``quantized``, ``sketch`` (base64 of little-endian fp32,
        NaN where weights lie on disk and cannot be read).
    """
    parameters = _parameters(model)
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters]
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else None
    quantized = is_quantized(model)
    dtypes = {str(p.dtype).removeprefix("torch.") for _, p in parameters if p.is_floating_point()}
    return {
        **_settings(model, lambda number: number),
        "parameters": _sha256(shapes),
        "vocabulary": None if vocabulary is None else _sha256(vocabulary),
        "dtype": max(dtypes, key=lambda name: _COARSENESS.get(name, 2), default="float32"),
        "quantized": quantized,
        "sketch": None if quantized else _encode(_sketch([p for _, p in parameters])),
    }


def _settings(model: nn.Module, spelt: Callable[[float], float]) -> dict[str, str]:
    """The hashes ``config`` and ``computation``, with the settings that are real numbers spelt so."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    described = {key: getattr(text, key, None) for key in _CONFIG_KEYS}
    rope = getattr(text, "rope_parameters", None)
    described["rope_theta"] = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    for key in ("rope_theta", "residual_multiplier"):
        if (number := described[key]) is not None:
            described[key] = spelt(number)
    computation = _canonical({key: getattr(text, key, None) for key in _COMPUTATION_KEYS}, spelt)
    return {"config": _sha256(described), "computation": _sha256(computation)}


def _single(number: float) -> float:
    """A number as a GGUF file holds it."""
    return float(np.float32(number))


def _short(number: float) -> float:
    """A number of a GGUF file as a config writes it: 1e-05, not 9.999999747378752e-06."""
    found = float(str(np.float32(number))) if _single(number) == number else number
    return int(found) if found.is_integer() else found


def _settings_as_recorded(recorded: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """Those hashes that are the recorded ones once numbers are spelt as in GGUF files, or as in configs."""
    spelt = [_settings(model, each) for each in (_single, _short, float)]
    return {key: value for each in spelt for key, value in each.items() if recorded.get(key) == value}


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What tokenizers of one vocabulary may differ in, JSON-serialisable.

    Returns:
        ``begins``: the special token that is put before a text; ``ends``: the end-of-text token;
        ``added_tokens`` and ``chat_template``: SHA-256. ``None`` for what there is none of.
    """
    first = (tokenizer("a")["input_ids"] or [None])[0]
    template = getattr(tokenizer, "chat_template", None)
    return {
        "begins": tokenizer.convert_ids_to_tokens(first) if first in tokenizer.all_special_ids else None,
        "ends": tokenizer.eos_token,
        "added_tokens": _sha256(sorted(tokenizer.get_added_vocab().items())),
        "chat_template": None if template is None else _sha256(template),
    }


def _tokenizers_differ(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """In what two `tokenizer_facts` differ, in words; ``""`` if in nothing."""
    told = []
    for key, what in (("begins", "begins texts with"), ("ends", "ends them with")):
        here, there = (each.get(key) for each in (present, recorded))
        if here != there:
            told.append(f"{what} {here or 'nothing'} (there {there or 'nothing'})")
    if recorded.get("added_tokens") != present.get("added_tokens"):
        told.append("has other added tokens")
    templates = [each.get("chat_template") for each in (present, recorded)]
    if templates[0] != templates[1]:
        told.append(f"has {'no' if templates[0] is None else 'another'} chat template")
    return ", ".join(told)


def _apart(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> float:
    """How far two models' weights are apart: median |a - b| / |b| of a parameter; infinite if not known."""
    try:
        ours, theirs = _decode(recorded["sketch"]), _decode(present["sketch"])
    except (KeyError, TypeError, ValueError):  # quantised weights have none
        return math.inf
    if abs(len(ours) - len(theirs)) > _ENTRIES:  # one matrix more where the output layer is not tied
        return math.inf
    count = min(len(ours), len(theirs)) // _ENTRIES
    ours, theirs = (each[: count * _ENTRIES].view(count, _ENTRIES) for each in (ours, theirs))
    shares = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    shares = shares[shares.isfinite()]  # offloaded weights are NaN, and biases may be 0
    return float(shares.median()) if len(shares) else math.inf


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by the names they have without `torch.compile`, tied ones once.

    Spread over devices or onto disk, tied weights are no longer one tensor; the model says which they are.
    """
    tied: dict[str, str] = {}
    for prefix, module in model.named_modules():
        own = getattr(module, "all_tied_weights_keys", None) or {}
        start = f"{prefix}." if prefix else ""
        tied |= {start + each: start + source for each, source in own.items()}
    found, first = [], dict[str, nn.Parameter]()
    for name, parameter in model.named_parameters():
        before = first.setdefault(tied.get(name, name), parameter)
        apart = parameter.is_meta or parameter.device != before.device
        if before is parameter or not apart:
            found.append((name.replace("_orig_mod.", ""), parameter))
    return found


def stored_weights(model: nn.Module) -> str:
    """SHA-256 of 16 entries of every tensor of the model, as stored.

    Distinguishes quantised models too, which have no sketch; another dtype counts as another model.
    """
    held = [tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]
    # 8-bit numbers are read as integers, since not all 8-bit dtypes can be indexed.
    plain = [each.view(torch.uint8) if each.dtype.itemsize == 1 else each for each in held if each.numel()]
    return hashlib.sha256(_encode(_sketch(plain)).encode()).hexdigest()


def compare_fingerprints(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """In what two fingerprints differ; an empty list means that they belong to the same model.

    Sketches are compared after rounding both to the coarser of the two dtypes; fp16 against bf16,
    where neither is coarser, with a relative tolerance of 2**-8. Quantised weights have no sketch
    and other shapes, so there only config and vocabulary count.

    Raises:
        AFTError: one of them is damaged.
    """
    try:
        return _differences(recorded, present)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AFTError(f"The vector's fingerprint is damaged ({error!r}).", "Train it again.") from error


def _differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    differences = []
    if recorded["config"] != present["config"]:
        differences.append("architecture")
    computations = (recorded.get("computation"), present.get("computation"))
    if None not in computations and computations[0] != computations[1]:
        differences.append(_COMPUTATION)
    quantized = recorded["quantized"] or present["quantized"]
    if not quantized and recorded["parameters"] != present["parameters"]:
        differences.append("parameter names or shapes")
    vocabularies = (recorded["vocabulary"], present["vocabulary"])
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        differences.append("tokenizer vocabulary")
    if not differences and not quantized and not _same_weights(recorded, present):
        differences.append("weights")
    return differences


def describe_base(base: Mapping[str, Any]) -> str:
    """A vector's ``base_model`` entry in words: the name, and the arguments that decide which weights it has.

    >>> describe_base({"name": "me/model", "revision": "main", "args": {"peft": "me/adapter"}})
    "'me/model' with peft='me/adapter'"
    """
    args = base.get("args")
    given = {"revision": base.get("revision"), **(args if isinstance(args, Mapping) else {})}
    told = [f"{key}={given[key]!r}" for key in WEIGHT_ARGS if given.get(key) not in (None, "", "main")]
    name = base.get("name") or "an unnamed model"
    return f"{name!r}{' with ' if told else ''}{', '.join(told)}"


def check_fingerprint(
    metadata: Mapping[str, Any],
    model: nn.Module,
    tokenizer: Any = None,
    *,
    allow_mismatch: bool = False,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a vector that was trained on another model than ``model``.

    Args:
        args: what ``model`` was loaded with (``revision``, ``peft``, ...), for the message.

    Raises:
        AFTError: the fingerprints differ; both models are named. With ``allow_mismatch`` this is
            a warning. A vector without a fingerprint (made by hand) passes.
    """
    recorded = metadata.get("fingerprint")
    if recorded is None:
        return
    present = fingerprint(model, tokenizer)
    present |= _settings_as_recorded(recorded, model)
    differences = compare_fingerprints(recorded, present)
    trained_on = describe_base(metadata.get("base_model") or {})
    place = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    name = describe_base({"name": place, "args": args})
    if args is None and hasattr(model, "peft_config"):
        name += " with a PEFT adapter"
    if differences:
        here = f"not on {name}" if name != trained_on else "which was loaded otherwise or has changed since"
        what = f"The vector was trained on {trained_on}, {here}: {', '.join(differences)} differ."
        if (apart := _apart(recorded, present)) < _KIN:
            what += (
                f" The two are kin: their weights are {apart:.1%} apart, as in two quantisations of one "
                "model or in a copy that was trained further."
            )
        if not allow_mismatch:
            raise AFTError(
                what,
                "Load the model it was trained on, with the same revision=, subfolder=, peft= or gguf_file= "
                "if it had one, or pass allow_mismatch=true to try it anyway.",
            )
        logger.warning("%s Continuing, because allow_mismatch is set.", what)
    elif (reason := _limits_of_comparison(recorded, present)) is not None:
        logger.warning("%s: the vector was trained on %s, this is %s.", reason, trained_on, name)
    facts = metadata.get("tokenizer")
    if tokenizer is not None and isinstance(facts, Mapping):
        told = _tokenizers_differ(facts, tokenizer_facts(tokenizer))
        if told:
            logger.warning("The tokenizer differs from that of %s: this one %s.", trained_on, told)


def _same_weights(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    ours, theirs = _decode(recorded["sketch"]), _decode(present["sketch"])
    if ours.shape != theirs.shape:
        return False
    readable = ~(torch.isnan(ours) | torch.isnan(theirs))  # offloaded weights cannot be sampled
    ours, theirs = ours[readable], theirs[readable]
    dtypes = {recorded["dtype"], present["dtype"]}
    if {"float16", "bfloat16"} <= dtypes:
        tiny = 2.0**-24  # the smallest subnormal of fp16
        return bool(torch.allclose(ours, theirs, rtol=2.0**-8, atol=tiny))
    if not dtypes <= _COARSENESS.keys():
        raise ValueError(f"a dtype of {sorted(dtypes)} is not known")
    coarser = getattr(torch, max(dtypes, key=lambda name: _COARSENESS[name]))
    return bool(torch.equal(ours.to(coarser), theirs.to(coarser)))


def _limits_of_comparison(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """Why equal fingerprints say little about the weights; ``None`` if they say enough."""
    if recorded["quantized"] or present["quantized"]:
        return "Quantised weights cannot be compared"
    ours, theirs = _decode(recorded["sketch"]), _decode(present["sketch"])
    readable = int((~(ours.isnan() | theirs.isnan())).sum())
    if 2 * readable >= ours.numel():
        return None
    share = f"{readable / ours.numel():.0%}" if readable else "none"
    return f"Weights that lie on disk cannot be compared, and {share} of them could be"


def _sketch(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    pieces = []
    for parameter in parameters:
        if parameter.device.type == "meta":
            pieces.append(torch.full((_ENTRIES,), torch.nan))
            continue
        flat = parameter.detach().reshape(-1)
        # The middle of 16 equal stretches: the first entries of an embedding are often
        # unused tokens, whose rows no training changes.
        step = torch.arange(_ENTRIES, dtype=torch.float64).add(0.5).mul(flat.numel() / _ENTRIES)
        pieces.append(flat[step.long().to(flat.device)].to("cpu", torch.float32))
    return torch.cat(pieces) if pieces else torch.zeros(0)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model's weights are quantised; those read from a GGUF file are not any more."""
    if any(not p.is_floating_point() for p in model.parameters()):
        return True
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method == "gguf":  # dequantised while it was read
        return False
    return bool(getattr(model, "is_quantized", False)) or quantizer is not None


def _canonical(value: Any, spelt: Callable[[float], float]) -> Any:
    """The settings in one form: numbers as floats, unset ones left out."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(each, spelt) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_canonical(each, spelt) for each in value]
    return value if isinstance(value, bool) or not isinstance(value, int | float) else float(spelt(value))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _encode(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())
