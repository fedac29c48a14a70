"""Scores packed rows: every context is read once, for the model as it is and for further vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_aft.engine.batching import capture, logits_at, resumed
from lm_eval_aft.engine.kv_cache import Budget, RowCache, StopForward
from lm_eval_aft.engine.precision import HALVES, ReorderedWeights, round_up
from lm_eval_aft.engine.rows import Answer, PackedRow, Step, packed_row, step_over, unpacked, within_budget
from lm_eval_aft.steering.backbone import Backbone, cache_argument
from lm_eval_aft.steering.hooks import RowSteering, add_all
from lm_eval_aft.steering.intervention import Shift, roles

logger = logging.getLogger(__name__)
# What a vector adds, by layer; see `lm_eval_aft.steering.hooks.layer_shifts`.
Shifts = Mapping[int, Shift]
Answers = dict[int, Answer]
T = TypeVar("T")
ROWS_REPORTED = 256  # rows of whole sequences after which their answers are handed on


class Scorer:
    """Log-likelihoods of a model, and of the same model under each of ``vectors`` (see `along`).

    Nothing below a vector's lowest layer depends on it, so its passes start there, from the first pass's
    hidden states (`lm_eval_aft.engine.batching.resumed`); tokens, masks and batches are shared too.

    Args:
        model: a causal LM, possibly with a vector attached; that state is the first one scored.
        softmax_dtype: as in `HFLM`.
        autocast: dtype of mixed precision, or None.
        rows: a router's vectors, each on the rows of the documents it was picked for.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        *,
        device: torch.device,
        softmax_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        rows: RowSteering | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.backbone = backbone
        self.device = device
        self.softmax_dtype = softmax_dtype
        self.autocast = autocast
        self.dtype = autocast or next(model.parameters()).dtype
        self.vectors: list[Shifts] = []  # scored too; the model must then be the baseline
        self.not_finite = 0  # tokens generated from logits that are NaN or infinite
        self.budget = Budget.of(device)
        # A model spread over devices moves its inputs in hooks that must see every pass end.
        placed = {parameter.device for parameter in model.parameters()}
        mapped = set(getattr(model, "hf_device_map", {}).values())
        self._may_stop = max(len(placed), len(mapped)) <= 1 and torch.device("meta") not in placed
        self._caches: list[RowCache | None] = [None] * 2
        self._reorders = autocast is None
        self._weights: ReorderedWeights | None = None
        # By path: whether it gives the right answers, and on rows of up to how many tokens.
        self._tried: dict[str, tuple[bool, int]] = {}

    @property
    def halves(self) -> bool:
        """Whether it computes in 16 bits because the weights are in 16 bits (not by mixed precision)."""
        return self.autocast is None and self.dtype in HALVES

    @contextmanager
    def prepared(self, fast: bool = True) -> Iterator[None]:
        """Inside the block passes use reordered weights where possible; with ``fast`` false they do not."""
        before = self._weights, self.budget
        self._weights = ReorderedWeights(self.model) if fast and self._reorders else None
        if self._weights:
            self.budget = Budget.of(self.device, reordered=True)
        try:
            yield
        finally:
            self._weights, budget = before
            if self.device.type == "cpu":  # elsewhere it may have been halved, for good
                self.budget = budget

    @property
    def reordered(self) -> bool:
        """Whether passes use reordered weights now."""
        return bool(self._weights)

    @contextmanager
    def along(self, vectors: Sequence[Shifts]) -> Iterator[None]:
        """Inside the block these vectors are scored too."""
        before, self.vectors = self.vectors, list(vectors)
        try:
            yield
        finally:
            self.vectors = before

    def holds(
        self, path: str, longest: int, run: Callable[[], T], differs: Callable[[T], str], otherwise: str
    ) -> bool:
        """Whether a path gives the right answers: tried on first use, and again on longer rows.

        Where answers differ with reordered weights only, these are no longer used.

        Args:
            longest: tokens of the longest row at hand.
            run: computes some answers on that path.
            differs: says how they differ from the right ones; ``""`` where they agree.
            otherwise: begins the log's warning; the reason follows.
        """

        def reason() -> str:
            try:
                found = run()
            except Exception as error:  # whatever a model's own code makes of such a pass
                return f"the model refuses it ({type(error).__name__}: {str(error)[:200]})"
            return differs(found)

        held, before = self._tried.get(path, (True, -1))
        if held and longest > before:
            why = reason()
            if why and self._weights:
                with self.prepared(fast=False):
                    differs_without_reordering = bool(reason())
                if not differs_without_reordering:
                    logger.warning("Weights are used in the order of the checkpoint: %s.", why)
                    self._reorders, self._weights, why = False, None, ""
            if why:
                logger.warning("%s: %s.", otherwise, why)
            self._tried[path] = not why, longest
        return self._tried[path][0]

    def packed(self, rows: Sequence[PackedRow], prefix: int = 0) -> Iterator[list[Answers]]:
        """Answers of every state, group by group of rows, each context in one pass of its own.

        ``prefix`` says how many tokens all contexts begin with in common; they are read once.
        """
        order = sorted(rows, key=lambda row: (-row.cached, -row.read_last))
        heads = self.prefixes(order[0].tokens[:prefix], order[0].state) if prefix else []
        while order:
            group = self.take(order)
            order = order[len(group) :]
            yield self.retrying(partial(self._group, group, prefix, heads))
        self.release()

    def plain(self, rows: Sequence[PackedRow]) -> Iterator[list[Answers]]:
        """Answers of every state from whole sequences, as stock `hf` reads them: only the head is saved."""
        order = sorted(unpacked(rows), key=lambda row: -row.width)
        for first in range(0, len(order), ROWS_REPORTED):
            yield self.retrying(partial(self._plain, order[first : first + ROWS_REPORTED]))

    def _plain(self, rows: Sequence[PackedRow]) -> list[Answers]:
        found: list[Answers] = [{} for _ in range(1 + len(self.vectors))]
        for chosen in within_budget(rows, lambda row: (1, row.width), self.budget.tokens):
            step = step_over(chosen, self.device)
            parts = self._run([step], [None, None], range(len(self.vectors)))
            for mine, more in zip(found, parts, strict=True):
                mine.update(more)
        return found

    def take(self, order: Sequence[PackedRow], more: int = 0) -> list[PackedRow]:
        """The first of ``order`` that fit into the cache together, with ``more`` columns each."""
        columns = order[0].cached
        limit = self.budget.cache // self.bytes_per_token()
        widest = scored = 0
        for taken, row in enumerate(order):
            widest = max(widest, row.read_last)
            scored += row.read_last
            cells = (taken + 1) * (columns + widest + more)
            if taken and (cells > limit or scored > 8 * self.budget.scored):
                return list(order[:taken])
        return list(order)

    def parameters(self) -> int:
        """Parameters used in products: all but input embeddings that are not tied to the head."""
        model: Any = self.model
        looked_up, head = (
            getattr(table, "weight", None)
            for table in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        spared = looked_up.numel() if looked_up is not None and looked_up is not head else 0
        return int(sum(parameter.numel() for parameter in model.parameters()) - spared)

    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all blocks."""
        model: Any = self.model
        text = model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", 1)
        width = getattr(text, "head_dim", None) or self.backbone.hidden_size // heads
        stored = getattr(text, "num_key_value_heads", None) or heads
        return int(2 * len(self.backbone.blocks) * stored * width * self.dtype.itemsize)

    def prefixes(self, tokens: Sequence[int], state: int = 0) -> list[Any]:
        """Keys and values of a common prefix, for the model with rows in ``state`` and each vector."""
        step = step_over([packed_row(tokens, state=state)], self.device)
        step.at = slice(0, 1)
        base = RowCache(1, len(tokens))
        self._run([step], [base, None], chosen=[])
        found = [base.prefix(len(tokens))]
        for i in range(len(self.vectors)):
            mine = RowCache(1, len(tokens))
            # This repeats the baseline's pass for each vector: prefixes are few.
            self._run([step], [base, mine], chosen=[i])
            found.append(mine.prefix(len(tokens)))
        return found

    def cache_for(self, rows: int, columns: int, which: int = 0) -> RowCache:
        """A cache of so many rows and columns, reusing the last one's memory where that is large enough."""
        have = self._caches[which]
        if have is None or not have.lay_out(rows, columns):
            have = self._caches[which] = RowCache(rows, columns)
        return have

    def release(self) -> None:
        """Free the memory of keys and values."""
        self._caches = [None] * 2

    def _group(self, group: Sequence[PackedRow], prefix: int, heads: Sequence[Any]) -> list[Answers]:
        columns = max(row.cached for row in group)
        widest = max(row.read_last for row in group)
        # Wide trees first, so that rows of one pass are about as wide as each other.
        rows = sorted(group, key=lambda row: -row.read_last)
        steps = [
            *context_steps(rows, prefix, self.budget.tokens, self.device),
            *tree_steps(rows, columns, self.budget.scored, self.device, self.dtype),
        ]
        for i in range(2 if self.vectors else 1):
            self.cache_for(len(rows), columns + widest, i)
        return self._run(steps, self._caches, range(len(self.vectors)), heads)

    def _run(
        self,
        steps: Sequence[Step],
        caches: Sequence[RowCache | None],
        chosen: Sequence[int],
        heads: Sequence[Any] = (),
    ) -> list[Answers]:
        """Run the passes for the model as it is, then resumed for each of the ``chosen`` vectors."""
        base, other = caches
        if heads and base is not None:
            base.load(heads[0])
        found: list[Answers] = [{}]
        kept: list[dict[int, Any]] = []
        starts = [min(self.vectors[i]) for i in chosen if self.vectors[i]]
        for step in steps:
            with capture(self.backbone, starts) as outputs:
                found[0].update(self._pass(step, base))
            kept.append(outputs)
        for i in chosen:
            shifts = self.vectors[i]
            if not shifts:
                found.append(dict(found[0]))
                continue
            lowest = min(shifts)
            if heads and other is not None:
                other.load(heads[1 + i])
            mine: Answers = {}
            for step, outputs in zip(steps, kept, strict=True):
                if not step.scored and lowest == len(self.backbone.blocks) - 1:
                    continue  # no keys or values depend on this vector
                with add_all(self.backbone, shifts), resumed(self.backbone, lowest, outputs[lowest]):
                    mine.update(self._pass(step, other))
            found.append(mine)
        return found

    def _pass(self, step: Step, cache: RowCache | None) -> Answers:
        logits = self.logits(step, cache)
        return answers(step, logits, self.softmax_dtype) if logits is not None and step.scored else {}

    def logits(self, step: Step, cache: RowCache | None) -> Tensor | None:
        """One pass: logits (R, vocabulary) at its scored positions; None where it ended early."""
        inputs: dict[str, Any] = {**step.inputs, "use_cache": False}
        if cache is not None and step.at is not None:
            # A context's logits are not needed, nor anything after its last block's keys and values.
            stop = len(self.backbone.blocks) - 1 if self._may_stop and not step.scored else None
            if step.contexts and isinstance(step.at, slice) and isinstance(step.start, int):
                cache.hide(step.at.start, step.contexts, step.start)
            cache.open(step.at, step.start, stop)
            inputs |= {cache_argument(self.model): cache, "use_cache": True}
        positions = torch.tensor(step.scored, dtype=torch.long, device=self.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._weights:
                stack.enter_context(self._weights.in_use())
            if self.rows is not None:
                stack.enter_context(self.rows.chosen(step.states))
            stack.enter_context(roles(step.roles))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, dtype=self.autocast))
            try:
                return logits_at(self.model, inputs, positions)
            except StopForward:
                return None

    def retrying(self, run: Callable[[], T]) -> T:
        """Try again with a smaller budget when an accelerator runs out of memory."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.budget.tokens <= 64:
                    raise
            self.budget = self.budget.halved()
            self.release()
            torch.cuda.empty_cache()
            logger.warning("Out of memory: scoring goes on with %d tokens a pass.", self.budget.tokens)


# The passes of scoring, and the answers their logits give.

# Rows of logits per log-softmax: on a CPU few enough to stay in its cache.
SOFTMAX_ROWS = {"cpu": 64}
DEFAULT_SOFTMAX_ROWS = 1024


def context_steps(
    rows: Sequence[PackedRow], prefix: int, budget: int, device: torch.device, columns: int = 0
) -> Iterator[Step]:
    """Passes over the contexts after their first ``prefix`` tokens: causal, padded on the right.

    With ``columns`` (how many the cache has), a single row is padded once to the length that reordered
    weights would otherwise pad it to at every product.
    """
    order = sorted(range(len(rows)), key=lambda i: -rows[i].cached)
    order = [i for i in order if rows[i].cached > prefix]
    for chosen in within_budget(order, lambda i: (1, rows[i].cached - prefix), budget):
        width = rows[chosen[0]].cached - prefix
        if columns and len(chosen) == 1:
            width = max(width, min(round_up(width), columns - prefix))
        parts = [packed_row(rows[i].tokens[prefix : rows[i].cached], state=rows[i].state) for i in chosen]
        step = step_over(parts, device, width=width)
        follow = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
        step.at = slice(chosen[0], chosen[-1] + 1) if follow else torch.tensor(chosen, device=device)
        step.start = prefix
        yield step


def tree_steps(
    rows: Sequence[PackedRow], columns: int, budget: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Step]:
    """Passes over the options, under a tree mask, behind ``columns`` columns of contexts."""
    first = 0
    for chosen in within_budget(rows, lambda row: (1, row.read_last), budget):
        step = step_over(chosen, device, dtype, columns=columns)
        step.at = slice(first, first + len(chosen))
        first += len(chosen)
        yield step


def answers(step: Step, logits: Tensor, softmax_dtype: Any) -> dict[int, Answer]:
    """Answers by request index, from logits (R, vocabulary) at the step's scored positions.

    Log-softmax is taken in ``softmax_dtype``, or in the logits' own dtype when it is None, as
    stock `hf` does; the sum over tokens in fp32 or better.
    """
    pairs = [
        (place, target, owner)
        for owner, (option, places) in enumerate(step.options)
        for place, target in zip(places, option.targets, strict=True)
    ]
    pairs.sort()
    place, target, owner = (torch.tensor(column, device=logits.device) for column in zip(*pairs, strict=True))
    many = SOFTMAX_ROWS.get(logits.device.type, DEFAULT_SOFTMAX_ROWS)
    bounds = np.searchsorted([p for p, _, _ in pairs], range(0, len(logits) + many, many))
    values, greedy = [], []
    for chunk in range(len(bounds) - 1):
        a, b = int(bounds[chunk]), int(bounds[chunk + 1])
        start = chunk * many
        logprobs = torch.log_softmax(logits[start : start + many], dim=-1, dtype=softmax_dtype)
        rows = place[a:b] - start
        chosen = logprobs[rows, target[a:b]]
        best = chosen == logprobs.amax(-1)[rows]
        # In a tie stock takes the index that argmax gives; argmax is slow, and rarely needed.
        tied = best.nonzero()[:, 0]
        best[tied] = logprobs[rows[tied]].argmax(-1) == target[a:b][tied]
        values.append(chosen)
        greedy.append(best)
    found = torch.cat(values)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    sums = torch.zeros(len(step.options), dtype=found.dtype, device=found.device).index_add(0, owner, found)
    misses = torch.zeros(len(step.options), dtype=torch.int32, device=found.device)
    misses.index_add_(0, owner, (~torch.cat(greedy)).to(torch.int32))
    return {
        option.index: (value, miss == 0)
        for (option, _), value, miss in zip(step.options, sums.tolist(), misses.tolist(), strict=True)
    }
