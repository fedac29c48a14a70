"""What one pass through the model reads, and which answers its logits give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_aft.positions import CONTEXT, PADDING, row_roles
from lm_eval_aft.scoring.reordered import round_up
from lm_eval_aft.scoring.requests import Answer, Option, Question, Request
from lm_eval_aft.scoring.slots import Rows

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
        states: which vector steers each row; see `lm_eval_aft.steering.RowSteering`.
        roles: (rows, tokens) what each token is; see `lm_eval_aft.positions`.
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
