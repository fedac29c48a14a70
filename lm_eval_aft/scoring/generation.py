"""Greedy generation, several tokens a pass, in batches that finished rows leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.positions import GENERATED, LAST
from lm_eval_aft.scoring.decoding import over_columns
from lm_eval_aft.scoring.drafts import MOST_SPANS, Followers, Width, Words
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
    """One prompt being continued: its question, its output, and what is known for guessing at more."""

    question: Question
    words: Words
    tokens: list[int] = field(default_factory=list)

    @property
    def index(self) -> int:
        """The prompt's number."""
        return self.question.options[0].index

    @property
    def last(self) -> int:
        """The last token, not read yet."""
        return self.tokens[-1] if self.tokens else self.question.tokens[0]

    @property
    def length(self) -> int:
        """Tokens before the last one: how many columns are filled, and the last one's position."""
        return len(self.question.context) + len(self.tokens)

    def append(self, token: int) -> None:
        """The output's next token."""
        self.tokens.append(token)
        self.words.append(token)


def prompt(index: int, tokens: Sequence[int], state: int = 0) -> Question:
    """A prompt as a question whose tree is its last token."""
    return Question(tuple(tokens[:-1]), (tokens[-1],), (-1,), (Option(index, (0,), (0,)),), state)


@dataclass(frozen=True)
class Ending:
    """When a row ends: after ``most`` tokens, with one of ``eos`` (kept, as in stock), or where ``stops``
    is true of its tokens so far."""

    most: int
    eos: frozenset[int]
    stops: Callable[[list[int]], bool]

    def after(self, tokens: list[int]) -> bool:
        """Whether the last of ``tokens`` is the row's last."""
        return tokens[-1] in self.eos or len(tokens) == self.most or self.stops(tokens)


def continuations(
    scorer: Scorer, prompts: Sequence[Question], ending: Ending, watch: Watch | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations as (prompt's index, tokens), in any order.

    A prefix that prompts share is read once. ``watch`` is shown the logits (vocabulary,) behind every
    token, with the prompt's index.
    """
    width = Width(scorer.parameters(), scorer.dtype.itemsize, scorer.bytes_per_token())
    outputs = Followers(MOST_SPANS)
    for prefix, members in with_common_prefixes(prompts):
        order = sorted(members, key=lambda question: -len(question.context))
        heads = scorer.prefixes(order[0].context[:prefix], order[0].state) if prefix else []
        while order:
            group = scorer.take(order, ending.most)
            order = order[len(group) :]
            yield from scorer.retrying(
                partial(_group, scorer, group, prefix, heads, ending, width, outputs, watch)
            )
    scorer.release()


def _group(
    scorer: Scorer,
    group: Sequence[Question],
    prefix: int,
    heads: Sequence[Any],
    ending: Ending,
    width: Width,
    outputs: Followers,
    watch: Watch | None,
) -> list[tuple[int, list[int]]]:
    # One column more than is needed: where guesses go that lie behind a row's last token.
    slots = scorer.slots(len(group), len(group[0].context) + ending.most + 1)
    if heads:
        slots.load(heads[0])
    room = slots.capacity if scorer.reordered else 0
    for step in context_steps(group, prefix, scorer.budget.tokens, scorer.device, room):
        scorer.logits(step, slots)
    slots.hide(0, [len(question.context) for question in group], slots.capacity)
    rows = [Row(question, Words((*question.context, *question.tokens), outputs)) for question in group]
    found = []
    before = 1
    while rows:
        lengths = [row.length for row in rows]
        most = max(ending.most - len(row.tokens) for row in rows)
        wide = width.choose(len(rows), sum(lengths) // len(rows), most)
        if wide < before:
            slots.hide(0, lengths, slots.capacity)  # guesses that this pass would not overwrite
        before = wide
        guesses = [row.words.guess(max(1, wide - 1)) for row in rows]
        logits = _read(scorer, slots, rows, guesses, wide, ending.most)
        if wide > 1 and bool(logits[:, 0].isnan().any()):
            # It may come of a guess: a mask hides no NaN.
            slots.hide(0, lengths, slots.capacity)
            logits = _read(scorer, slots, rows, guesses, 1, ending.most)
        written = logits.argmax(-1).tolist()
        for r in reversed(range(len(rows))):
            width.observe(guesses[r], written[r][0])
            if not _append(rows[r], written[r], guesses[r], ending, logits[r], watch):
                continue
            found.append((rows[r].index, rows[r].tokens))
            # The last row takes the place of the one that leaves.
            final = rows.pop()
            if r < len(rows):
                rows[r] = final
                slots.move(len(rows), r)
    return found


def _append(
    row: Row,
    written: Sequence[int],
    guesses: Sequence[int],
    ending: Ending,
    logits: Tensor,
    watch: Watch | None,
) -> bool:
    """Continue the row as far as what it was ``written`` for was guessed right; whether that ends it."""
    for k, token in enumerate(written):
        if watch is not None:
            watch(row.index, logits[k])
        row.append(token)
        if ending.after(row.tokens):
            return True
        if guesses[k : k + 1] != [token]:
            break
    return False


def _read(
    scorer: Scorer, slots: Slots, rows: Sequence[Row], guesses: Sequence[list[int]], wide: int, most: int
) -> Tensor:
    """Logits (rows, wide, vocabulary) after each row's last token and after its guesses."""
    n, device = len(rows), scorer.device
    ids = [[row.last, *mine, *[0] * wide][:wide] for row, mine in zip(rows, guesses, strict=True)]
    columns = [[min(row.length + k, len(row.question.context) + most) for k in range(wide)] for row in rows]
    roles = [[GENERATED if row.tokens else LAST, *[GENERATED] * (wide - 1)] for row in rows]
    at = torch.tensor(columns, device=device)
    ahead = torch.arange(1 + max(map(max, columns)), device=device) > at[..., None]
    mask = torch.zeros(ahead.shape, dtype=scorer.dtype, device=device)
    mask.masked_fill_(ahead, torch.finfo(scorer.dtype).min)
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": mask[:, None],
        "position_ids": at,
    }
    step = Step(
        inputs,
        slice(0, n),
        at,
        list(range(n * wide)),
        states=[row.question.state for row in rows],
        roles=torch.tensor(roles, device=device),
    )
    with over_columns([1 + last for *_, last in columns], device):
        logits = scorer.logits(step, slots)
    assert logits is not None
    return logits.float().view(n, wide, -1)
