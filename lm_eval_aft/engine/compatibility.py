"""Whether a model supports packed rows (4-D attention masks), from its config and by trying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_eval_aft.engine.batching import (
    Document,
    continuation_logits,
    lay_out,
    make_batch,
    option_logprobs,
    units,
)
from lm_eval_aft.engine.rows import Answer
from lm_eval_aft.steering.backbone import UNTOLD, attention_kernel, input_device

# Families whose attention a 4-D mask cannot express, even if a check on short rows passes.
UNPACKABLE = {
    "bloom": "ALiBi positions follow the row, not the position ids",
    "falcon": "its ALiBi variants refuse 4-D masks",
    "gpt_neo": "local attention layers ignore a supplied mask",
    "gemma2": "alternating sliding windows need masks of their own",
    "mpt": "ALiBi positions follow the row, not the position ids",
}


# Rotary positions that change for the whole batch once its longest row passes the trained length.
_BY_LENGTH = ("dynamic", "longrope")


def refused(model: nn.Module, longest: int) -> str:
    """Why this model's config rules out packing prompts of ``longest`` tokens; ``""`` when it does not."""
    config: Any = model.config
    text = config.get_text_config()
    family = str(getattr(text, "model_type", ""))
    if family in UNPACKABLE and getattr(text, "alibi", True):
        return f"{family}: {UNPACKABLE[family]}"
    stateful = getattr(model, "_is_stateful", None)
    if stateful is None and isinstance(model, PreTrainedModel):
        return "this transformers does not say whether blocks carry a state along the row"
    if stateful:
        return f"{family}: its blocks carry a state along the row, which no mask divides"
    kernel = attention_kernel(model)
    if kernel == UNTOLD:
        return "this transformers does not say which attention kernel a model uses"
    if kernel not in (None, "eager", "sdpa"):
        return f"{kernel} takes no 4-D masks"
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and longest > window:
        return f"prompts are longer than the sliding window of {window} tokens"
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and longest > chunk:
        return f"prompts are longer than the attention's chunks of {chunk} tokens"
    rope = _rope(text)
    if rope.get("rope_type") in _BY_LENGTH:
        return f"{rope['rope_type']} rotary positions depend on the row's length"
    return ""


def row_decides(model: nn.Module, longest: int) -> bool:
    """Whether rotary positions of rows of up to ``longest`` tokens depend on the rest of their batch."""
    config: Any = model.config
    text = config.get_text_config()
    rope = _rope(text)
    if rope.get("rope_type") not in _BY_LENGTH:
        return False
    return longest > int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)


def _rope(text: Any) -> dict[str, Any]:
    found = getattr(text, "rope_parameters", None)
    return found if isinstance(found, dict) else {}


def disagreement(fast: Tensor, slow: Tensor, tokens: Tensor, dtype: torch.dtype) -> str:
    """Compare log-likelihoods (options,) of two paths; ``""`` when they agree.

    In 16 bits only gross errors can be told from rounding: the tolerance is 0.1 nats a token (``tokens``
    counts them). In fp32 it is the larger of 1e-4 and 1e-6 of the value.
    """
    difference = (fast - slow).abs()
    if dtype in (torch.float32, torch.float64):
        bar = torch.maximum(torch.full_like(difference, 1e-4), 1e-6 * slow.abs())
    else:
        bar = 0.1 * tokens.to(difference)
    return "" if bool((difference <= bar).all()) else f"differ by {float(difference.max()):.2g} nats"


def answers_differ(
    found: Sequence[Answer], wanted: Sequence[Answer], tokens: Sequence[int], dtype: torch.dtype
) -> str:
    """How two paths' answers to requests of so many ``tokens`` each differ; ``""`` when they agree."""
    fast, slow = (torch.tensor([value for value, _ in each], dtype=torch.float64) for each in (found, wanted))
    reason = disagreement(fast, slow, torch.tensor(tokens), dtype)
    if reason:
        return f"log-likelihoods {reason}"
    exact = dtype in (torch.float32, torch.float64)
    same = not exact or all(a[1] == b[1] for a, b in zip(found, wanted, strict=True))
    return "" if same else "greedy decoding differs"


def logits_differ(found: Tensor, wanted: Tensor, tokens: Sequence[int], dtype: torch.dtype) -> str:
    """How logits (tokens, vocabulary) differ in the log-probabilities of ``tokens``; ``""`` if they agree."""
    written = torch.tensor(tokens)[:, None]
    fast, slow = (each.float().cpu().log_softmax(-1).gather(-1, written)[:, 0] for each in (found, wanted))
    if dtype in (torch.float32, torch.float64):
        return disagreement(fast, slow, torch.ones(len(tokens)), dtype)
    # One token's rounding says nothing in 16 bits: together they are within 0.1 nats a token.
    return disagreement(fast.sum()[None], slow.sum()[None], torch.tensor([len(tokens)]), dtype)


def may_pack(model: nn.Module, documents: Sequence[Document]) -> str:
    """Why ``documents`` cannot be packed for this model; ``""`` when they can.

    Checks the config, then compares packed with unpacked log-likelihoods on the two longest
    documents, or two of the group with the longest row.
    """
    together = [[documents[i] for i in unit] for unit in units(documents)]
    widths = [max(row.width for row in lay_out(unit, True)) for unit in together]
    # Positions start again after every shared part: no token is further from another than in plain rows.
    reason = refused(model, max(document.tokens(False) for document in documents))
    if reason:
        return reason
    if all(len(lay_out(unit, True)) == len(lay_out(unit, False)) for unit in together):
        return "every document has one continuation per context"
    order = sorted(range(len(together)), key=lambda i: -widths[i])
    probe = [document for i in order[:2] for document in together[i][:2]][:2]
    config: Any = model.config
    family = config.get_text_config().model_type
    parameter = next(model.parameters())
    scores = []
    try:
        for packed in (True, False):
            batch = make_batch(probe, packed, input_device(model), parameter.dtype)
            with torch.no_grad():
                scores.append(option_logprobs(continuation_logits(model, batch), batch))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return f"{family} refuses a 4-D mask ({type(error).__name__})"
    tokens = torch.bincount(batch.option, minlength=len(scores[0]))
    reason = disagreement(scores[0], scores[1], tokens, parameter.dtype)
    return reason and f"packed and unpacked rows {reason} on {family}"
