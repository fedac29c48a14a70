"""Scores questions: every context is read once, for the model as it stands and for further vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lm_eval_aft.engine.batching import capture, logits_at, resumed
from lm_eval_aft.engine.kv_cache import Budget, RowCache, Rows, StopForward
from lm_eval_aft.engine.precision import ReorderedWeights, round_up
from lm_eval_aft.engine.requests import Answer, Option, Question, Request
from lm_eval_aft.steering.backbone import Backbone, cache_argument
from lm_eval_aft.steering.hooks import RowSteering, add_all
from lm_eval_aft.steering.intervention import CONTEXT, PADDING, Shift, roles, row_roles

logger = logging.getLogger(__name__)
# What a vector adds, by layer; see `lm_eval_aft.steering.hooks.layer_shifts`.
Shifts = Mapping[int, Shift]
Answers = dict[int, Answer]
T = TypeVar("T")


class Scorer:
    """Log-likelihoods of a model, and of the same model under each of ``vectors``.

    Below a vector's lowest layer nothing depends on it, so its passes start there, from what the
    first pass left (`lm_eval_aft.engine.batching.resumed`); tokens, masks and batches are shared too.

    Args:
        model: a causal LM, possibly with a vector attached; that state is the first one scored.
        dtype: what masks are made in: the activations' dtype.
        softmax_dtype: as in `HFLM`.
        autocast: dtype of mixed precision, or None.
        vectors: further states to score, as shifts by layer; the model must then be the baseline.
        rows: where rows of one pass are steered differently: what does it.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        *,
        device: torch.device,
        softmax_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        vectors: Sequence[Shifts] = (),
        rows: RowSteering | None = None,
    ) -> None:
        self.model = model
        self.rows = rows
        self.backbone = backbone
        self.device = device
        self.softmax_dtype = softmax_dtype
        self.autocast = autocast
        self.dtype = autocast or next(model.parameters()).dtype
        self.vectors = list(vectors)
        self.budget = Budget.of(device)
        # A model spread over devices moves its inputs in hooks that must see every pass end.
        placed = {parameter.device for parameter in model.parameters()}
        mapped = set(getattr(model, "hf_device_map", {}).values())
        self._may_stop = max(len(placed), len(mapped)) <= 1 and torch.device("meta") not in placed
        self._slots: list[RowCache | None] = [None] * 2
        self._reorders = autocast is None
        self._weights: ReorderedWeights | None = None

    @contextmanager
    def prepared(self, fast: bool = True) -> Iterator[None]:
        """Inside the block passes multiply with reordered weights, where the model has such; or do not."""
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
        """Whether passes multiply with reordered weights now."""
        return bool(self._weights)

    def unless_reordered(self, differs: Callable[[], str]) -> str:
        """Why passes differ from stock: ``""`` where only reordered weights do, which are then given up."""
        reason = differs()
        if reason and self._weights:
            with self.prepared(fast=False):
                differs_without_reordering = bool(differs())
            if not differs_without_reordering:
                logger.warning("Weights are used in the order of the checkpoint: %s.", reason)
                self._reorders, self._weights, reason = False, None, ""
        return reason

    def packed(self, questions: Sequence[Question], prefix: int = 0) -> Iterator[list[Answers]]:
        """Answers of every state, group by group of questions, each context in one pass of its own.

        ``prefix`` says how many tokens all contexts begin with in common; they are read once.
        """
        order = sorted(questions, key=lambda question: (-len(question.context), -len(question.tokens)))
        heads = self.prefixes(order[0].context[:prefix], order[0].state) if prefix else []
        while order:
            group = self.take(order)
            order = order[len(group) :]
            yield self.retrying(partial(self._group, group, prefix, heads))
        self.release()

    def plain(
        self, requests: Sequence[tuple[int, Request]], states: Sequence[int] = ()
    ) -> Iterator[list[Answers]]:
        """Answers of every state, pass by pass over whole sequences: only the head is saved.

        ``states`` gives each request's row state by its index; default all 0.
        """
        order = sorted(requests, key=lambda item: -len(item[1][1]) - len(item[1][2]))
        many = 256
        for first in range(0, len(order), many):
            yield self.retrying(partial(self._plain, order[first : first + many], states))

    def _plain(self, requests: Sequence[tuple[int, Request]], states: Sequence[int]) -> list[Answers]:
        found: list[Answers] = [{} for _ in range(1 + len(self.vectors))]
        for step in plain_steps(requests, self.budget.tokens, self.device, states):
            parts = self._run([step], [None, None], range(len(self.vectors)))
            for mine, more in zip(found, parts, strict=True):
                mine.update(more)
        return found

    def take(self, order: Sequence[Question], more: int = 0) -> list[Question]:
        """The first of ``order`` that go together: keys and values must fit, with ``more`` columns."""
        columns = len(order[0].context)
        limit = self.budget.cache // self.bytes_per_token()
        group: list[Question] = []
        widest = scored = 0
        for question in order:
            widest = max(widest, len(question.tokens))
            scored += len(question.tokens)
            if group and (
                (len(group) + 1) * (columns + widest + more) > limit or scored > 8 * self.budget.scored
            ):
                break
            group.append(question)
        return group

    def parameters(self) -> int:
        """Numbers that a token is multiplied with: all but a table of embeddings of their own."""
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
        inputs = {"input_ids": torch.tensor([tokens], device=self.device)}
        step = Step(inputs, slice(0, 1), states=[state], roles=torch.full((1, len(tokens)), CONTEXT))
        base = RowCache(1, len(tokens))
        self._run([step], [base, None], chosen=[])
        found = [base.prefix(len(tokens))]
        for i in range(len(self.vectors)):
            mine = RowCache(1, len(tokens))
            # The baseline's pass is made once more for each vector: prefixes are few.
            self._run([step], [base, mine], chosen=[i])
            found.append(mine.prefix(len(tokens)))
        return found

    def slots(self, rows: int, columns: int, which: int = 0) -> RowCache:
        """Keys and values of so many rows and columns, in the memory of those before where it is enough."""
        have = self._slots[which]
        if have is None or not have.lay_out(rows, columns):
            have = self._slots[which] = RowCache(rows, columns)
        return have

    def release(self) -> None:
        """Free the memory of keys and values."""
        self._slots = [None] * 2

    def _group(self, group: Sequence[Question], prefix: int, heads: Sequence[Any]) -> list[Answers]:
        columns = max(len(question.context) for question in group)
        widest = max(len(question.tokens) for question in group)
        # Wide trees first, so that rows of one pass are about as wide as each other.
        rows = sorted(group, key=lambda question: -len(question.tokens))
        steps = [
            *context_steps(rows, prefix, self.budget.tokens, self.device),
            *tree_steps(rows, columns, self.budget.scored, self.device, self.dtype),
        ]
        for i in range(2 if self.vectors else 1):
            self.slots(len(rows), columns + widest, i)
        return self._run(steps, self._slots, range(len(self.vectors)), heads)

    def _run(
        self,
        steps: Sequence[Step],
        slots: Sequence[RowCache | None],
        chosen: Sequence[int],
        heads: Sequence[Any] = (),
    ) -> list[Answers]:
        """Make the passes for the model as it is, then resumed for each of the ``chosen`` vectors."""
        base, other = slots
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

    def _pass(self, step: Step, slots: RowCache | None) -> Answers:
        logits = self.logits(step, slots)
        return answers(step, logits, self.softmax_dtype) if logits is not None and step.scored else {}

    def logits(self, step: Step, slots: RowCache | None) -> Tensor | None:
        """One pass: logits (R, vocabulary) at its scored positions; None where it could end early."""
        inputs: dict[str, Any] = {**step.inputs, "use_cache": False}
        if slots is not None and step.at is not None:
            # A context's logits are not wanted, nor what its last block makes of its keys and values.
            stop = len(self.backbone.blocks) - 1 if self._may_stop and not step.scored else None
            if step.contexts and isinstance(step.at, slice) and isinstance(step.start, int):
                slots.hide(step.at.start, step.contexts, step.start)
            slots.open(step.at, step.start, stop)
            inputs |= {cache_argument(self.model): slots, "use_cache": True}
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


# What one pass through the model reads, and which answers its logits give.

# Rows of logits whose log-softmax is taken at once: on a CPU few enough to stay in its cache.
SOFTMAX_ROWS = {"cpu": 64}
DEFAULT_SOFTMAX_ROWS = 1024


@dataclass
class Step:
    """One pass.

    Attributes:
        inputs: keyword arguments of the model, ``input_ids`` (rows, tokens) among them.
        at: the slots' rows that it fills; None without slots.
        start: the slots' first column that it fills, or (rows, tokens) each row's columns.
        scored: (R,) flat positions in rows x tokens whose logits are needed; none for contexts.
        options: (option, its places in ``scored``) that the logits answer.
        states: which vector steers each row; see `lm_eval_aft.steering.hooks.RowSteering`.
        roles: (rows, tokens) what each token is; see `lm_eval_aft.steering.intervention`.
        contexts: of a pass over options, how many of the slots' columns each row's context fills.
    """

    inputs: dict[str, Tensor]
    at: Rows | None = None
    start: int | Tensor = 0
    scored: list[int] = field(default_factory=list)
    options: list[tuple[Option, list[int]]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    roles: Tensor | None = None
    contexts: list[int] = field(default_factory=list)


def context_steps(
    questions: Sequence[Question], prefix: int, budget: int, device: torch.device, columns: int = 0
) -> Iterator[Step]:
    """Passes over the contexts after their first ``prefix`` tokens: causal, padded on the right.

    With ``columns``, how many there are to fill, a row by itself is padded as far as reordered weights
    would have it padded at every product.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].context))
    order = [i for i in order if len(questions[i].context) > prefix]
    while order:
        width = len(questions[order[0]].context) - prefix
        rows, order = order[: max(1, budget // width)], order[max(1, budget // width) :]
        if columns and len(rows) == 1:
            width = max(width, min(round_up(width), columns - prefix))
        ids = np.zeros((len(rows), width), dtype=np.int64)
        kinds = np.full((len(rows), width), PADDING)
        for r, i in enumerate(rows):
            own = questions[i].context[prefix:]
            ids[r, : len(own)] = own
            kinds[r, : len(own)] = CONTEXT
        follow = rows == list(range(rows[0], rows[0] + len(rows)))
        at = slice(rows[0], rows[0] + len(rows)) if follow else torch.tensor(rows, device=device)
        states = [questions[i].state for i in rows]
        inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        yield Step(inputs, at, prefix, states=states, roles=torch.from_numpy(kinds).to(device))


def tree_steps(
    questions: Sequence[Question], columns: int, budget: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Step]:
    """Passes over the options, under a tree mask, behind ``columns`` columns of contexts."""
    first = 0
    while first < len(questions):
        last = first + 1
        width = len(questions[first].tokens)
        while last < len(questions):
            wider = max(width, len(questions[last].tokens))
            if (last + 1 - first) * wider > budget:
                break
            width, last = wider, last + 1
        yield _tree_step(questions[first:last], first, columns, width, device, dtype)
        first = last


def _tree_step(
    questions: Sequence[Question],
    first: int,
    columns: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Step:
    rows = len(questions)
    ids = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros((rows, width), dtype=np.int64)
    kinds = np.full((rows, width), PADDING)
    visible = np.zeros((rows, width, columns + width), dtype=bool)
    # Padding sees itself, so that no row of the softmax is empty.
    visible[:, np.arange(width), columns + np.arange(width)] = True
    scored: list[int] = []
    options = []
    for r, question in enumerate(questions):
        n = len(question.tokens)
        ids[r, :n] = question.tokens
        positions[r, :n] = np.asarray(question.depths()) + len(question.context)
        kinds[r, :n] = row_roles(1, n - 1)
        tree = visible[r, :, columns:]
        for node in range(1, n):
            tree[node] |= tree[question.parents[node]]
        visible[r, :n, : len(question.context)] = True
        places = {
            node: len(scored) + k
            for k, node in enumerate(sorted({node for option in question.options for node in option.nodes}))
        }
        scored += [r * width + node for node in places]
        options += [(option, [places[node] for node in option.nodes]) for option in question.options]
    mask = torch.zeros(visible.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(dtype).min)
    inputs = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": mask.unsqueeze(1).to(device),
        "position_ids": torch.from_numpy(positions).to(device),
    }
    states = [question.state for question in questions]
    known = torch.from_numpy(kinds).to(device)
    contexts = [len(question.context) for question in questions]
    return Step(inputs, slice(first, first + rows), columns, scored, options, states, known, contexts)


def plain_steps(
    requests: Sequence[tuple[int, Request]], budget: int, device: torch.device, states: Sequence[int] = ()
) -> Iterator[Step]:
    """Passes over whole sequences, as stock `hf` makes them, a row for each distinct sequence.

    ``states`` gives each request's state by its index; default all 0.
    """
    # The context's length counts: it says which tokens are steered as a prompt's.
    wanted: dict[tuple[int, int, tuple[int, ...]], list[Option]] = {}
    for index, (_, head, tail) in requests:
        option = Option(index, tuple(range(len(tail))), tuple(tail))
        key = (states[index] if states else 0, len(head), (*head, *tail[:-1]))
        wanted.setdefault(key, []).append(option)
    rows = sorted(wanted, key=lambda row: -len(row[2]))
    while rows:
        width = len(rows[0][2])
        chunk, rows = rows[: max(1, budget // width)], rows[max(1, budget // width) :]
        ids = np.zeros((len(chunk), width), dtype=np.int64)
        kinds = np.full((len(chunk), width), PADDING)
        scored: list[int] = []
        options = []
        for r, (state, context, row) in enumerate(chunk):
            ids[r, : len(row)] = row
            kinds[r] = row_roles(context, len(row) - context, width)
            options += [
                (option, [len(scored) + k for k in option.nodes]) for option in wanted[state, context, row]
            ]
            scored += range(r * width + context - 1, r * width + len(row))
        inputs = {"input_ids": torch.from_numpy(ids).to(device)}
        of_rows = [state for state, _, _ in chunk]
        yield Step(inputs, None, 0, scored, options, of_rows, torch.from_numpy(kinds).to(device))


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
        # Where values tie, stock takes the index that argmax names; argmax is slow, and seldom needed.
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
