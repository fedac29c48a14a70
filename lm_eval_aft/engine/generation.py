"""Greedy generation with drafted tokens, several a pass, and the texts that lm-eval expects."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_aft._util.private_names import borrowed
from lm_eval_aft.engine.attention import over_columns
from lm_eval_aft.engine.checks import finite, less_precise, logits_differ, packing_ruled_out
from lm_eval_aft.engine.kv_cache import RowCache
from lm_eval_aft.engine.precision import computed_in_float32
from lm_eval_aft.engine.rows import (
    PackedRow,
    Step,
    additive_mask,
    packed_row,
    shortest_and_longest,
    step_over,
    with_common_prefixes,
)
from lm_eval_aft.engine.scorer import Scorer, context_steps
from lm_eval_aft.engine.stock import StockLM
from lm_eval_aft.steering.intervention import GENERATED, LAST

logger = logging.getLogger(__name__)
Watch = Callable[[int, Tensor], None]
# Settings of a generation config that do not change which token greedy decoding picks.
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
class DecodingRow:
    """One prompt being continued: its row, its output, and the statistics that drafts come from."""

    prompt: PackedRow
    words: Words
    tokens: list[int] = field(default_factory=list)

    @property
    def index(self) -> int:
        """The prompt's number."""
        return self.prompt.options[0].index

    @property
    def last(self) -> int:
        """The last token, not read yet."""
        return self.tokens[-1] if self.tokens else self.prompt.tokens[-1]

    @property
    def length(self) -> int:
        """Tokens before the last one: the number of filled columns, and the last one's position."""
        return self.prompt.cached + len(self.tokens)

    def append(self, token: int) -> None:
        """The output's next token."""
        self.tokens.append(token)
        self.words.append(token)


def prompt(index: int, tokens: Sequence[int], state: int = 0) -> PackedRow:
    """A prompt as a row; its option only carries the index."""
    return packed_row(tokens, [((), [(index, [0])])], state=state)


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
    scorer: Scorer, prompts: Sequence[PackedRow], ending: Ending, watch: Watch | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Greedy continuations as (prompt's index, tokens), in any order.

    A prefix that prompts share is read once. ``watch`` is shown the logits (vocabulary,) behind every
    token, with the prompt's index.
    """
    width = Width(scorer.parameters(), scorer.dtype.itemsize, scorer.bytes_per_token())
    outputs = Followers(MOST_SPANS)
    for prefix, members in with_common_prefixes(prompts):
        order = sorted(members, key=lambda row: -row.cached)
        heads = scorer.prefixes(order[0].tokens[:prefix], order[0].state) if prefix else []
        while order:
            group = scorer.take(order, ending.most)
            order = order[len(group) :]
            yield from scorer.retrying(
                partial(_group, scorer, group, prefix, heads, ending, width, outputs, watch)
            )
    scorer.release()


def _group(
    scorer: Scorer,
    group: Sequence[PackedRow],
    prefix: int,
    heads: Sequence[Any],
    ending: Ending,
    width: Width,
    outputs: Followers,
    watch: Watch | None,
) -> list[tuple[int, list[int]]]:
    # One extra column, for guesses beyond a row's last possible token.
    cache = scorer.cache_for(len(group), group[0].cached + ending.most + 1)
    if heads:
        cache.load(heads[0])
    room = cache.capacity if scorer.reordered else 0
    for step in context_steps(group, prefix, scorer.budget.tokens, scorer.device, room):
        scorer.logits(step, cache)
    cache.hide(0, [prompt.cached for prompt in group], cache.capacity)
    rows = [DecodingRow(prompt, Words(prompt.tokens, outputs)) for prompt in group]
    found = []
    before = 1
    while rows:
        lengths = [row.length for row in rows]
        most = max(ending.most - len(row.tokens) for row in rows)
        wide = width.choose(len(rows), sum(lengths) // len(rows), most)
        if wide < before:
            cache.hide(0, lengths, cache.capacity)  # wrong guesses that this pass will not overwrite
        before = wide
        guesses = [row.words.guess(max(1, wide - 1)) for row in rows]
        logits = _read(scorer, cache, rows, guesses, wide, ending.most)
        if wide > 1 and bool(logits[:, 0].isnan().any()):
            # A guess may have caused it: a mask does not hide NaN.
            cache.hide(0, lengths, cache.capacity)
            logits = _read(scorer, cache, rows, guesses, 1, ending.most)
        written = logits.argmax(-1).tolist()
        sound = finite(logits).tolist()
        for r in reversed(range(len(rows))):
            width.observe(guesses[r], written[r][0])
            before_it = len(rows[r].tokens)
            ended = _append(rows[r], written[r], guesses[r], ending, logits[r], watch)
            scorer.not_finite += sound[r][: len(rows[r].tokens) - before_it].count(False)
            if not ended:
                continue
            found.append((rows[r].index, rows[r].tokens))
            # The last row takes the place of the one that leaves.
            final = rows.pop()
            if r < len(rows):
                rows[r] = final
                cache.move(len(rows), r)
    return found


def _append(
    row: DecodingRow,
    written: Sequence[int],
    guesses: Sequence[int],
    ending: Ending,
    logits: Tensor,
    watch: Watch | None,
) -> bool:
    """Append the tokens ``written`` up to the first wrong guess; return whether the row has ended."""
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
    scorer: Scorer,
    cache: RowCache,
    rows: Sequence[DecodingRow],
    guesses: Sequence[list[int]],
    wide: int,
    most: int,
) -> Tensor:
    """Logits (rows, wide, vocabulary) after each row's last token and after its guesses."""
    n, device = len(rows), scorer.device
    ids = [[row.last, *mine, *[0] * wide][:wide] for row, mine in zip(rows, guesses, strict=True)]
    columns = [[min(row.length + k, row.prompt.cached + most) for k in range(wide)] for row in rows]
    roles = [[GENERATED if row.tokens else LAST, *[GENERATED] * (wide - 1)] for row in rows]
    at = torch.tensor(columns, device=device)
    seen = torch.arange(1 + max(map(max, columns)), device=device) <= at[..., None]
    step = Step(
        {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": additive_mask(seen, scorer.dtype)[:, None],
            "position_ids": at,
        },
        torch.tensor(roles, device=device),
        list(range(n * wide)),
        states=[row.prompt.state for row in rows],
        at=slice(0, n),
        start=at,
    )
    with over_columns([1 + last for *_, last in columns], device):
        logits = scorer.logits(step, cache)
    assert logits is not None
    return logits.float().view(n, wide, -1)


# Generation requests: which may be decoded in shared batches, and the text their tokens make.

with borrowed(
    "lm-eval: lm_eval.models.utils (handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text)"
):
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text


@dataclass(frozen=True)
class Settings:
    """A request's gen_kwargs: stop strings (end of text included) and maximum number of new tokens."""

    until: tuple[str, ...]
    most: int


class Texts:
    """Answers generation requests by greedy decoding in shared batches.

    On first use, and again for prompts longer than any before, the shortest and the longest prompt are
    decoded by stock too, and their logits compared with a plain pass (where some positions only are steered,
    with `Naive` alone); if they differ, everything is left to stock, and the log says so.
    Texts are those of stock at batch size 1. In 16 bits stock's own texts depend on the batch size; there the
    logits must be as near to float32's as those of a plain pass are.
    """

    def __init__(self, lm: StockLM, scorer: Scorer) -> None:
        self.lm = lm
        self.scorer = scorer
        self.taken: Counter[str] = Counter()

    def answers(self, requests: Sequence[Instance], states: Sequence[int] = ()) -> Iterator[tuple[int, str]]:
        """(Index, text) of the requests that shared batches can answer, in any order.

        Only for models without a `refusal`. ``states`` says, request by request, which of the
        scorer's ``rows`` steers it.
        """
        groups: dict[Settings, list[PackedRow]] = {}
        for index, request in enumerate(requests):
            context, kwargs = request.args
            settings = self._settings(kwargs)
            if settings is None:
                continue
            row = self._prompt(index, context, settings, states[index] if states else 0)
            if row is not None:
                groups.setdefault(settings, []).append(row)
        shared = 0
        with self.scorer.prepared():
            for settings, prompts in groups.items():
                if self._holds(prompts, settings, requests):
                    shared += len(prompts)
                    yield from self._decode(prompts, settings)
        self.taken += Counter({"generated in shared batches": shared, "stock": len(requests) - shared})

    def refusal(self) -> str:
        """Why stock must write all of this model's texts; an empty string when it need not."""
        lm = self.lm
        if self.scorer.autocast is not None:
            return "mixed precision"
        if lm.truncation or lm.think_end_token is not None:
            return "truncation or thinking"
        return unusual(lm.model.generation_config)

    def _settings(self, gen_kwargs: Any) -> Settings | None:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.lm.max_gen_toks))
        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        greedy = not kwargs.pop("do_sample", False) and not kwargs.pop("temperature", 0)
        if kwargs or not greedy or not 0 < most < self.lm.max_length:
            return None
        return Settings(tuple(until), most)

    def _prompt(self, index: int, context: str, settings: Settings, state: int) -> PackedRow | None:
        ids, _ = self.lm.tok_batch_encode([context], left_truncate_len=self.lm.max_length - settings.most)
        tokens = ids[0].tolist()
        if not tokens or packing_ruled_out(self.lm.model, len(tokens) + settings.most):
            return None
        return prompt(index, tokens, state)

    def _holds(self, prompts: list[PackedRow], settings: Settings, requests: Sequence[Instance]) -> bool:
        probe = shortest_and_longest(prompts, lambda row: row.width)

        def decode() -> tuple[dict[int, str], str]:
            seen: dict[int, list[Tensor]] = {}
            texts = dict(
                self._decode(probe, settings, lambda i, logits: seen.setdefault(i, []).append(logits))
            )
            reasons = (self._logits_differ(row, torch.stack(seen[row.options[0].index])) for row in probe)
            return texts, "; ".join(filter(None, reasons))

        def differs(found: tuple[dict[int, str], str]) -> str:
            texts, reason = found
            if reason or self.lm.naive is not None or self.scorer.halves:
                return reason
            stock = self.lm.some_stock_texts([requests[i] for i in sorted(texts)])
            return "" if stock == [texts[i] for i in sorted(texts)] else "its texts differ"

        longest = max(row.width for row in prompts) + settings.most
        return self.scorer.holds("generation", longest, decode, differs, "Generation is left to stock")

    def _logits_differ(self, prompt: PackedRow, fast: Tensor) -> str:
        """Compare the logits of each token with those of one plain pass; texts alone would show little."""
        tokens = fast.argmax(-1).tolist()

        def plain() -> Tensor:
            if self.lm.naive is not None:
                return self.lm.naive.logits_behind(prompt.tokens, tokens, prompt.state)
            row = packed_row(prompt.tokens, [((), [(0, tokens)])], state=prompt.state)
            with self.scorer.prepared(fast=False):
                logits = self.scorer.logits(step_over([row], self.scorer.device), None)
            assert logits is not None
            return logits

        slow = plain()
        if not self.scorer.halves:
            return logits_differ(fast, slow, tokens, self.scorer.dtype)
        with computed_in_float32(self.scorer.model):
            found = [fast, slow, plain()]
        written = torch.tensor(tokens)[:, None]
        return less_precise(
            *(each.float().cpu().log_softmax(-1).gather(-1, written)[:, 0].tolist() for each in found)
        )

    def _decode(
        self, prompts: Sequence[PackedRow], settings: Settings, watch: Watch | None = None
    ) -> Iterator[tuple[int, str]]:
        tokenizer = self.lm.tokenizer
        # As far back as stock looks: a stop string may be written in other tokens than its own.
        back = 2 + max(len(tokenizer.encode(stop, add_special_tokens=False)) for stop in settings.until)

        @lru_cache(maxsize=1 << 16)  # small models repeat themselves, and decoding is slower than a look-up
        def holds_stop(tokens: tuple[int, ...]) -> bool:
            text = tokenizer.decode(tokens)
            return any(stop in text for stop in settings.until)

        def stops(tokens: list[int]) -> bool:
            return holds_stop(tuple(tokens[-back:]))

        eos = self.lm.model.generation_config.eos_token_id
        ends = frozenset(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
        ending = Ending(settings.most, ends, stops)
        for index, tokens in continuations(self.scorer, prompts, ending, watch):
            text = postprocess_generated_text(
                generation=self.lm.tok_decode(tokens), stop=list(settings.until), think_end_token=None
            )
            yield index, text


# Drafts: guesses at a row's next tokens, from the prompts and the outputs so far.
#
# A pass that reads a guess after a row's last token shows whether greedy decoding would have written it,
# and every right guess saves a pass. This is prompt-lookup decoding (Saxena 2023; Yang et al. 2023,
# arXiv:2304.04487) for batches: the most frequent continuation is guessed, rows learn from each other's
# outputs, and drafts are as long as pays off.

# Longest span that is looked up, and most tokens a row reads in one pass: its last one and its guesses.
SPAN = 3
WIDEST = 8
# Weights of a token in the row's prompt, in another row's output and in its own output.
PROMPT, OTHERS, OWN = 1, 3, 6
# Spans of outputs that are kept (about 400 bytes each) before all are dropped.
MOST_SPANS = 100_000
# Floating-point operations in the time of reading a byte (measured on CPUs: 8; on an H200 in fp32: 14).
OPERATIONS_PER_BYTE = 10
# Relative extra time of attention for each further token of a row in a pass (measured: 0.06 to 0.3).
ATTENTION_PER_GUESS = 0.1


class Followers:
    """How often each token followed each span of up to ``SPAN`` tokens."""

    def __init__(self, most: float = float("inf")) -> None:
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._most = most

    def __len__(self) -> int:
        """How many spans are known."""
        return len(self._counts)

    def count(self, span: tuple[int, ...], token: int, weight: int) -> None:
        """Count ``token`` as following ``span`` and every suffix of it."""
        if len(self) >= self._most:
            self._counts.clear()
        for start in range(len(span)):
            counts = self._counts.setdefault(span[start:], {})
            counts[token] = counts.pop(token, 0) + weight  # the last one counted is the last one listed

    def after(self, span: tuple[int, ...]) -> dict[int, int]:
        """The tokens that followed exactly this span, and how often."""
        return self._counts.get(span, {})


class Words:
    """The last tokens of one row, and guesses at the next ones.

    Args:
        tokens: the prompt.
        others: counts from the outputs of all rows; this row's output is added.
    """

    def __init__(self, tokens: Iterable[int], others: Followers) -> None:
        self._last: tuple[int, ...] = ()
        self._own = Followers()
        self._others = others
        for token in tokens:
            self._own.count(self._last, token, PROMPT)
            self._last = (*self._last, token)[-SPAN:]

    def append(self, token: int) -> None:
        """The row's next token."""
        self._own.count(self._last, token, OWN - OTHERS)
        self._others.count(self._last, token, OTHERS)
        self._last = (*self._last, token)[-SPAN:]

    def guess(self, count: int) -> list[int]:
        """Up to ``count`` likely next tokens, each the most frequent one after those before it."""
        last = self._last
        found: list[int] = []
        while len(found) < count and (token := self._next(last)) is not None:
            found.append(token)
            last = (*last, token)[-SPAN:]
        return found

    def _next(self, last: tuple[int, ...]) -> int | None:
        """The most frequent follower of the longest known span; of equals, the one seen last."""
        for start in range(len(last)):
            own, others = self._own.after(last[start:]), self._others.after(last[start:])
            if own or others:
                # Of equals `max` names the first.
                tokens = [*reversed(own), *reversed(others)]
                return max(tokens, key=lambda token: own.get(token, 0) + others.get(token, 0))
        return None


class Width:
    """How many tokens a row should read in the next pass, from how often first guesses were right.

    Reading more tokens saves passes, and with them reads of keys and values (and of weights, where rows are
    few), but costs products. The decision is computed, not timed: the same rows always make the same passes.

    Args:
        parameters: of the blocks and the head, each used once per token.
        itemsize: bytes per parameter.
        kept: bytes of keys and values per token.
    """

    def __init__(self, parameters: int, itemsize: int, kept: int) -> None:
        self._parameters = parameters
        self._itemsize = itemsize
        self._kept = kept
        self._right = 1
        self._made = 2

    def observe(self, guesses: Sequence[int], token: int) -> None:
        """Count whether the first of ``guesses`` was right: ``token`` was written."""
        self._made += 1
        self._right += guesses[:1] == [token]

    def choose(self, rows: int, columns: int, most: int) -> int:
        """Tokens per row, 1 to ``most``, for ``rows`` rows that see ``columns`` columns."""
        right = self._right / self._made

        def tokens_per_cost(width: int) -> float:
            expected = sum(right**k for k in range(width))
            products = 2 * self._parameters * rows * width / OPERATIONS_PER_BYTE
            attention = self._kept * rows * columns * (1 + ATTENTION_PER_GUESS * (width - 1))
            return expected / (max(products, self._parameters * self._itemsize) + attention)

        return max(range(1, min(most, WIDEST) + 1), key=tokens_per_cost)
