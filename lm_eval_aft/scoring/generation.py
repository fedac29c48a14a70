"""Greedy generation in batches that finished rows leave, on keys and values kept in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.positions import GENERATED, LAST
from lm_eval_aft.scoring.loglikelihood import Scorer
from lm_eval_aft.scoring.requests import Option, Question, with_common_prefixes
from lm_eval_aft.scoring.slots import Slots
from lm_eval_aft.scoring.steps import Step, context_steps

Watch = Callable[[int, Tensor], None]
# Settings of a generation config that say nothing about which token greedy decoding takes next.
HARMLESS = {
    "_from_model_config", "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length",
    "output_attentions", "output_hidden_states", "pad_token_id", "return_dict_in_generate", "temperature",
    "top_k", "top_p", "transformers_version", "use_cache",
}  # fmt: skip


def unusual(config: Any) -> str:
    """The settings of a transformers generation config that only stock generation honours."""
    settings = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {"config": config}
    return ", ".join(
        sorted(key for key, value in settings.items() if key not in HARMLESS and value is not None)
    )


@dataclass
class Row:
    """One prompt being continued; ``done`` says, after each token, whether that was the last."""

    question: Question
    tokens: list[int] = field(default_factory=list)

    @property
    def index(self) -> int:
        """The prompt's number."""
        return self.question.options[0].index


def prompt(index: int, tokens: Sequence[int], state: int = 0) -> Question:
    """A prompt as a question whose tree is its last token."""
    return Question(tuple(tokens[:-1]), (tokens[-1],), (-1,), (Option(index, (0,), (0,)),), state)


def continuations(
    scorer: Scorer,
    prompts: Sequence[Question],
    most: int,
    eos: set[int],
    stops: Callable[[list[int]], bool],
    watch: Watch | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations as (prompt's index, tokens), in any order.

    A row ends after ``most`` tokens, with a token of ``eos`` (kept, as in stock), or when ``stops``
    is true of its tokens so far. A prefix that prompts share is read once. ``watch`` is shown the
    logits (vocabulary,) behind every token, with the prompt's index.
    """
    for prefix, members in with_common_prefixes(prompts):
        order = sorted(members, key=lambda question: -len(question.context))
        heads = scorer.prefixes(order[0].context[:prefix], order[0].state) if prefix else []
        while order:
            group = scorer.take(order, most)
            order = order[len(group) :]
            run = partial(_group, scorer, group, prefix, heads, most, eos, stops, watch)
            yield from scorer.retrying(run)
    scorer.release()


def _group(
    scorer: Scorer,
    group: Sequence[Question],
    prefix: int,
    heads: Sequence[Any],
    most: int,
    eos: set[int],
    stops: Callable[[list[int]], bool],
    watch: Watch | None,
) -> list[tuple[int, list[int]]]:
    columns = len(group[0].context)
    slots = scorer.slots(len(group), columns + most)
    if heads:
        slots.load(heads[0])
    for step in context_steps(group, prefix, scorer.budget.tokens, scorer.device):
        scorer.logits(step, slots)
    slots.hide(0, [len(question.context) for question in group], columns)
    lengths = torch.tensor([len(question.context) for question in group], device=scorer.device)
    mask = _hiding(lengths, columns, columns + most, scorer.dtype)
    rows = [Row(question) for question in group]
    last = torch.tensor([question.tokens for question in group], device=scorer.device)
    found = []
    for made in range(most):
        n = len(rows)
        states = [row.question.state for row in rows]
        role = GENERATED if made else LAST
        logits = _next(scorer, slots, last[:n], lengths[:n] + made, mask[:n], columns + made, states, role)
        if watch is not None:
            for row, seen in zip(rows, logits, strict=True):
                watch(row.index, seen)
        last = logits.argmax(-1, keepdim=True)
        for r, token in reversed(list(enumerate(last[:, 0].tolist()))):
            row = rows[r]
            row.tokens.append(token)
            if token in eos or len(row.tokens) == most or stops(row.tokens):
                found.append((row.index, row.tokens))
                # The last row takes the place of the one that leaves.
                final = len(rows) - 1
                if r != final:
                    rows[r] = rows[final]
                    slots.move(final, r)
                    for tensor in (lengths, mask, last):
                        tensor[r] = tensor[final].clone()
                rows.pop()
        if not rows:
            break
    return found


def _hiding(lengths: Tensor, columns: int, capacity: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (rows, 1, 1, capacity) of the columns between each context's end and ``columns``."""
    column = torch.arange(capacity, device=lengths.device)
    hidden = (column >= lengths[:, None]) & (column < columns)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def _next(
    scorer: Scorer,
    slots: Slots,
    last: Tensor,
    positions: Tensor,
    mask: Tensor,
    column: int,
    states: list[int],
    role: int,
) -> Tensor:
    """Logits (rows, vocabulary) after the tokens ``last`` (rows, 1), which go to ``column``."""
    n = len(last)
    inputs = {
        "input_ids": last,
        "attention_mask": mask[..., : column + 1],
        "position_ids": positions[:, None],
    }
    roles = torch.full((n, 1), role, device=last.device)
    step = Step(inputs, slice(0, n), column, list(range(n)), states=states, roles=roles)
    logits = scorer.logits(step, slots)
    assert logits is not None
    return logits.float()
