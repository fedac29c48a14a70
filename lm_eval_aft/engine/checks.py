"""Checks of the optimised paths: models that they suit, answers that agree, and a plain reference.

What a config rules out is not tried. What is tried is compared: with stock code, or, where a vector steers
only some positions, with `Naive`, since another release of a library could change which tokens those are
without raising an error. Answers that are NaN or infinite are noticed while they are computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm_eval_aft._util.errors import AFTError, not_finite_cause
from lm_eval_aft.engine.batching import (
    TokenizedDocument,
    continuation_logits,
    lay_out,
    make_batch,
    option_logprobs,
    units,
)
from lm_eval_aft.engine.precision import HALVES, computed_in_float32
from lm_eval_aft.engine.rows import Answer, Request
from lm_eval_aft.steering.backbone import UNTOLD, Backbone, attention_kernel, input_device
from lm_eval_aft.steering.hooks import RowSteering, hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import unsteered
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector

logger = logging.getLogger(__name__)
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


def packing_ruled_out(model: nn.Module, longest: int) -> str:
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


def rows_may_be_packed(model: nn.Module, documents: Sequence[TokenizedDocument]) -> bool:
    """Whether a model's config and the documents allow packed rows; a loaded model is tested as well."""
    if packing_ruled_out(model, max(document.tokens(False) for document in documents)):
        return False
    together = [[documents[i] for i in unit] for unit in units(documents)]
    return any(len(lay_out(unit, True)) < len(lay_out(unit, False)) for unit in together)


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


def disagreement(
    fast: Tensor, slow: Tensor, tokens: Tensor, dtype: torch.dtype, rounding: float = 0.0
) -> str:
    """Compare log-likelihoods (options,) of two paths; ``""`` when they agree.

    In 16 bits only gross errors can be told from rounding: the tolerance is 0.1 nats a token (``tokens``
    counts them). In fp32 it is the largest of 1e-4, 1e-6 of the value, and ``rounding`` (nats).
    """
    difference = (fast - slow).abs()
    if dtype in (torch.float32, torch.float64):
        bar = torch.maximum(torch.full_like(difference, max(1e-4, rounding)), 1e-6 * slow.abs())
    else:
        bar = 0.1 * tokens.to(difference)
    return "" if bool((difference <= bar).all()) else f"differ by {float(difference.max()):.2g} nats"


def answers_differ(
    found: Sequence[Answer],
    wanted: Sequence[Answer],
    tokens: Sequence[int],
    dtype: torch.dtype,
    rounding: float = 0.0,
) -> str:
    """How two paths' answers to requests of so many ``tokens`` each differ; ``""`` when they agree.

    In fp32 differences up to ``rounding`` (nats) say nothing; see `disagreement`.
    """
    fast, slow = (torch.tensor([value for value, _ in each], dtype=torch.float64) for each in (found, wanted))
    reason = disagreement(fast, slow, torch.tensor(tokens), dtype, rounding)
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


# Documents whose 16-bit scores are compared with float32's.
PROBE_DOCUMENTS = 16
# In 16 bits the root mean square error against float32 may be so many times stock's own, which is as much
# chance; errors below this (nats) decide nothing.
ERRORS, SMALL_ERROR = 1.5, 0.005


def less_precise(fast: Sequence[float], slow: Sequence[float], precise: Sequence[float]) -> str:
    """Why 16-bit log-likelihoods are further from float32's than stock's are; ``""``: they are not.

    Where rounding alone moves answers by tenths of a nat, two ways that are equally right differ by as much.

    Args:
        fast, slow, precise: ours, stock's (both in 16 bits) and those computed in float32, in nats.
    """
    exact = np.asarray(precise)
    ours, stock = (float(np.sqrt(np.mean((np.asarray(each) - exact) ** 2))) for each in (fast, slow))
    told = f"err by {ours:.2g} nats against float32, stock's by {stock:.2g}"
    logger.info("16-bit answers %s (root mean square of %d).", told, len(exact))
    return "" if ours <= max(ERRORS * stock, SMALL_ERROR) else told  # not where either is NaN


def packing_problem(model: nn.Module, documents: Sequence[TokenizedDocument]) -> str:
    """Why ``documents`` cannot be packed for this model; ``""`` when they can.

    Checks the config, then compares packed with unpacked log-likelihoods on the two longest
    documents, or two of the group with the longest row.
    """
    together = [[documents[i] for i in unit] for unit in units(documents)]
    widths = [max(row.width for row in lay_out(unit, True)) for unit in together]
    # Positions start again after every shared part: no token is further from another than in plain rows.
    reason = packing_ruled_out(model, max(document.tokens(False) for document in documents))
    if reason:
        return reason
    if all(len(lay_out(unit, True)) == len(lay_out(unit, False)) for unit in together):
        return "every document has one continuation per context"
    order = sorted(range(len(together)), key=lambda i: -widths[i])
    probe = [document for i in order[:2] for document in together[i][:2]][:2]
    config: Any = model.config
    family = config.get_text_config().model_type
    dtype = next(model.parameters()).dtype
    try:
        packed, plain = (_scores(model, probe, each, dtype) for each in (True, False))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return f"{family} refuses a 4-D mask ({type(error).__name__})"
    tokens = torch.tensor([len(tail) for document in probe for _, tail in document.pairs])
    reason = disagreement(packed, plain, tokens, dtype)
    if reason and dtype in HALVES:
        spread = np.linspace(0, len(order) - 1, PROBE_DOCUMENTS // 2).round().astype(int)
        probe = [document for i in sorted({*spread}) for document in together[order[i]][:2]]
        found = [_scores(model, probe, each, dtype) for each in (True, False)]
        with computed_in_float32(model):
            found.append(_scores(model, probe, False, torch.float32))
        reason = less_precise(*(each.tolist() for each in found))
    return reason and f"packed and unpacked rows {reason} on {family}"


@torch.no_grad()
def _scores(
    model: nn.Module, documents: Sequence[TokenizedDocument], packed: bool, dtype: torch.dtype
) -> Tensor:
    """Log-likelihoods (options,) of the documents' options, two documents a pass."""
    found = []
    for i in range(0, len(documents), 2):
        batch = make_batch(documents[i : i + 2], packed, input_device(model), dtype)
        found.append(option_logprobs(continuation_logits(model, batch), batch).cpu())
    return torch.cat(found)


# The reference: one row at a time, without a cache; which tokens are steered is decided by counting.

# Tokens that are generated to check generation.
PROBE_TOKENS = 8


class Naive:
    """Reference logits of a steered model.

    Args:
        model: a causal LM; vectors attached to it that steer some positions only are disabled during a pass.
        vector_of: the vector that steers a row in each state; see `lm_eval_aft.steering.hooks.RowSteering`.
        window: maximum number of tokens in a row.
        softmax_dtype: as in `HFLM`.
        autocast: dtype of mixed precision, or None.
        rows: the router's vectors on the model, if there are any; disabled during a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        vector_of: Callable[[int], SteeringVector | None],
        *,
        device: torch.device,
        window: int,
        softmax_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        rows: RowSteering | None = None,
    ) -> None:
        self.model: Any = model
        self.backbone = backbone
        self.vector_of = vector_of
        self.device = device
        self.window = window
        self.softmax_dtype = softmax_dtype
        self.autocast = autocast
        self.rows = rows
        self.dtype = autocast or next(model.parameters()).dtype

    def logits(self, tokens: Sequence[int], context: int, state: int = 0) -> Tensor:
        """Logits (tokens, vocabulary) after each token; the first ``context`` of them are the context."""
        vector = self.vector_of(state)
        with self._settings(0) as stack:
            stack.enter_context(unsteered())
            if vector is not None and vector.coefficient:
                steered = torch.tensor(_steered(vector.positions, context, len(tokens)))
                for layer in vector.layers:
                    hook = self.backbone.blocks[layer].register_forward_hook(_adding(vector, layer, steered))
                    stack.callback(hook.remove)
            ids = torch.tensor([list(tokens)], device=self.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found

    @contextmanager
    def _settings(self, state: int) -> Iterator[ExitStack]:
        """No gradients, mixed precision as configured, rows in a state."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.rows is not None:
                stack.enter_context(self.rows.chosen(state))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.autocast))
            yield stack

    def answer(self, request: Request, state: int = 0) -> Answer:
        """Log-likelihood in nats of a request that fits the window, and whether greedy decoding writes it."""
        _, context, continuation = request
        logits = self.logits([*context, *continuation][:-1], len(context), state)[len(context) - 1 :]
        targets = torch.tensor(continuation, device=logits.device)
        values = logits.log_softmax(-1, dtype=self.softmax_dtype)
        greedy = bool((values.argmax(-1) == targets).all())
        return float(values.gather(-1, targets[:, None]).sum()), greedy

    def fits(self, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether a request fits the window."""
        return len(context) + len(continuation) <= self.window + 1

    def differs(self, requests: Sequence[Request], answers: Sequence[Answer], states: Sequence[int]) -> str:
        """How ``answers`` differ from the reference; ``""`` where they agree."""
        naive = [self.answer(request, state) for request, state in zip(requests, states, strict=True)]
        return answers_differ(answers, naive, [len(tail) for _, _, tail in requests], self.dtype)

    def logits_behind(self, prompt: Sequence[int], tokens: Sequence[int], state: int) -> Tensor:
        """The logits (tokens, vocabulary) that should have written ``tokens`` after the prompt."""
        return self.logits([*prompt, *tokens][:-1], len(prompt), state)[len(prompt) - 1 :]

    def generation_differs(self, prompts: Sequence[Sequence[int]], state: int, pad: int) -> str:
        """How ``generate``, on these prompts as one padded batch, differs from the reference."""
        prompts = [prompt for prompt in prompts if 0 < len(prompt) <= self.window - PROBE_TOKENS]
        if not prompts:
            return ""
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with self._settings(state):
            try:
                found = self.model.generate(
                    input_ids=ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    max_new_tokens=PROBE_TOKENS,
                    do_sample=False,
                    pad_token_id=pad,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            except AFTError as error:
                return error.what.rstrip(".")
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list | tuple) else [ends]
        for row, prompt in enumerate(prompts):
            tokens = found.sequences[row, width:].tolist()
            written = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
            logits = torch.stack([step[row] for step in found.logits[:written]])
            tokens = tokens[:written]
            wanted = self.logits_behind(prompt, tokens, state)
            reason = logits_differ(logits, wanted, tokens, self.dtype)
            if reason:
                return f"its tokens' log-probabilities {reason}"
        return ""


def wrong(what: str, positions: str, reason: str) -> AFTError:
    """The error to raise when nothing that computes ``what`` steers the right tokens."""
    releases = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "lm_eval"))
    return AFTError(
        f"{what} would not steer the tokens that positions={positions!r} names, on this model with "
        f"{releases}: {reason}.",
        "Steer all positions, or install other versions of these; `aft doctor` shows which answers hold.",
    )


def _steered(positions: str, context: int, tokens: int) -> list[bool]:
    """Which of a row's tokens are steered, given that the first ``context`` of them are the context."""
    kinds = {
        "all": range(tokens),
        "prompt": range(context),
        "last": range(context - 1, context),
        "generated": range(context, tokens),
    }
    return [i in kinds[positions] for i in range(tokens)]


def _adding(vector: SteeringVector, layer: int, steered: Tensor) -> Callable[..., Any]:
    method = METHODS[vector.method]

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        own = {name: tensor.to(hidden.device) for name, tensor in vector.tensors.items()}
        delta = method.delta(own, layer, hidden.to(own[f"layers.{layer}"].dtype)) * vector.coefficient
        where = steered.to(hidden.device)[None, :, None]
        return with_hidden_states(output, torch.where(where, hidden + delta.to(hidden.dtype), hidden))

    return hook


# Numbers that are no numbers.

_PROMPT = "Question: What is the capital of France?\nAnswer: Paris"


def baseline_not_finite(model: Any) -> AFTError:
    """The error to raise where a model's answers are not finite, and no vector steers it."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AFTError(
        f"The model gives NaN or infinite numbers in {dtype}, without any vector.",
        f"The reason: {not_finite_cause(dtype)}",
    )


def require_finite(lm: Any) -> None:
    """Read one short prompt with a model that nothing steers.

    Args:
        lm: lm-eval's ``hf`` model, or one derived from it.

    Raises:
        AFTError: its logits are not finite; the dtype is blamed.
    """
    ids = [lm.prefix_token_id, *lm.tok_encode(_PROMPT, add_special_tokens=False)][: lm.max_length]
    autocast = lm.mixed_precision_dtype
    with torch.no_grad(), torch.autocast(lm.device.type, dtype=autocast, enabled=autocast is not None):
        logits = lm.model(torch.tensor([ids], device=lm.device)).logits
    if not bool(finite(logits).all()):
        raise baseline_not_finite(lm.model)


def finite(logits: Tensor) -> Tensor:
    """Whether each position's logits (..., vocabulary) choose a token: none NaN, the largest finite."""
    return logits.amax(-1).isfinite()


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside the block count the passes whose last positions' logits were not all `finite`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    odd: list[Tensor] = []

    def look(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        found = (~finite(logits[..., -1, :])).any()
        odd[:] = [odd[0] + found] if odd else [found.long()]  # counted on the device, which need not wait

    handle = head.register_forward_hook(look) if isinstance(head, nn.Module) else None
    try:
        yield lambda: int(odd[0]) if odd else 0
    finally:
        if handle is not None:
            handle.remove()
