"""A plain reference for a steered model's answers, used to check the optimised paths.

One row at a time, without a cache; which tokens are steered is decided by counting, not by watching the
model. Answers are checked against it where a vector steers only some positions: another release of a library
could change which tokens those are without raising an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.compatibility import answers_differ, logits_differ
from lm_eval_aft.engine.rows import Answer, Request
from lm_eval_aft.steering.backbone import Backbone
from lm_eval_aft.steering.hooks import RowSteering, hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import unsteered
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector

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
