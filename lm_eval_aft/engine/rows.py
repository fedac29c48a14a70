"""The packed row that training and scoring share: a tree of tokens, and the tensors of a pass over rows.

A row holds a context once, followed by its continuations; positions, roles and the mask follow from which
token each run of tokens continues. Training reads whole rows in one pass with gradients; scoring reads a
row's context into a key-value cache first and the rest behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lm_eval_aft.engine.kv_cache import Rows
from lm_eval_aft.steering.intervention import CONTEXT, GENERATED, LAST, PADDING

Tokens = tuple[int, ...]
T = TypeVar("T")
# What lm-eval hands to `_loglikelihood_tokens`: (strings or None, context ids, continuation ids).
Request = tuple[Any, list[int], list[int]]
# Summed log-likelihood in nats, and whether greedy decoding would have written the continuation.
Answer = tuple[float, bool]

# Options with more tokens together than this are cut into several rows: the mask grows with the square.
MOST_TOKENS = 1024
# A prefix common to many requests is worth a pass of its own from this many tokens on,
SHORTEST_PREFIX = 32
# where it saves at least this many.
SMALLEST_GAIN = 256


class Span(NamedTuple):
    """Consecutive tokens of a row, from ``start`` to the next run, that continue the token ``after``.

    They see each other causally, and all that the token ``after`` sees (-1: nothing, for a row's first run).
    """

    start: int
    after: int
    role: int


@dataclass(frozen=True)
class Option:
    """One continuation: the row's tokens at ``places`` predict its tokens, ``targets``."""

    index: int
    places: tuple[int, ...]
    targets: Tokens


@dataclass(frozen=True)
class PackedRow:
    """A context and its continuations, or several contexts that begin alike and theirs.

    Attributes:
        tokens: token ids; the last token of a continuation is only predicted and has no place here.
        runs: how the tokens continue each other, in order; the first run is the prefix that all others see.
        options: the continuations.
        state: which vector steers it, where several do; see `lm_eval_aft.steering.hooks.RowSteering`.
    """

    tokens: Tokens
    runs: tuple[Span, ...]
    options: tuple[Option, ...] = ()
    state: int = 0

    @property
    def width(self) -> int:
        """Tokens it takes."""
        return len(self.tokens)

    @property
    def prefix(self) -> int:
        """Tokens in the first run."""
        return self.runs[1].start if len(self.runs) > 1 else len(self.tokens)

    @property
    def cached(self) -> int:
        """Tokens that scoring reads into the cache: the context but for its last one, which predicts."""
        return self.prefix - 1

    @property
    def read_last(self) -> int:
        """Tokens that scoring reads behind the cache."""
        return len(self.tokens) - self.cached

    @property
    def unshared(self) -> int:
        """How many different rows its options would need by themselves."""
        return len({option.places for option in self.options})

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the context and one continuation, its last token included."""
        return self.prefix + max(len(option.targets) for option in self.options)


# What follows a row's prefix: the rest of a context, and its continuations (index, tokens).
Branch = tuple[Sequence[int], Sequence[tuple[int, Sequence[int]]]]


def packed_row(
    prefix: Sequence[int], branches: Iterable[Branch] = (), *, merge: bool = False, state: int = 0
) -> PackedRow:
    """A row of a prefix (not empty) and its branches.

    ``merge`` reads continuations that begin alike once, as far as they do.

    >>> packed_row([5, 6], [((), [(0, [7, 8, 9]), (1, [7, 1])])], merge=True).tokens
    (5, 6, 7, 8)
    """
    if not prefix:
        raise ValueError("A row needs a context, of which the last token predicts the first continuation.")
    tokens, runs, options = list(prefix), [Span(0, -1, CONTEXT)], []
    for rest, tails in branches:
        last = len(prefix) - 1
        if rest:
            runs.append(Span(len(tokens), last, CONTEXT))
            tokens += rest
            last = len(tokens) - 1
        children: dict[tuple[int, int], int] = {}
        for index, tail in tails:
            read, places = tail[:-1], [last]
            while merge and len(places) <= len(read):
                child = children.get((places[-1], read[len(places) - 1]))
                if child is None:
                    break
                places.append(child)
            after, read = places[-1], read[len(places) - 1 :]
            new = range(len(tokens), len(tokens) + len(read))
            if read and (after == last or after != new.start - 1):
                runs.append(Span(new.start, after, GENERATED))
            if merge:
                children.update(zip(zip((after, *new), read, strict=False), new, strict=True))
            tokens += read
            options.append(Option(index, (*places, *new), tuple(tail)))
    return PackedRow(tuple(tokens), tuple(runs), tuple(options), state)


def common_prefix(contexts: Sequence[Tokens]) -> int:
    """How many first tokens all contexts share, each keeping at least one of its own."""
    # The smallest and the largest of them differ soonest.
    low, high = min(contexts), max(contexts)
    most = min(len(low), len(high)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def gather(requests: Iterable[tuple[int, Request]], states: Sequence[int] = ()) -> list[PackedRow]:
    """A row for consecutive requests with the same context, in order of appearance.

    ``states`` gives each request's state by its index; default all 0.
    """
    rows: list[PackedRow] = []
    current: list[tuple[int, list[int]]] = []
    context: list[int] = []
    state = 0

    def close() -> None:
        if current:
            rows.append(packed_row(context, [((), current)], merge=True, state=state))

    for index, (_, head, tail) in requests:
        own = states[index] if states else 0
        full = sum(len(t) for _, t in current) + len(tail) > MOST_TOKENS
        if head != context or own != state or full:
            close()
            current = []
        context, state = head, own
        current.append((index, tail))
    close()
    return rows


def unpacked(rows: Iterable[PackedRow]) -> list[PackedRow]:
    """Rows without branches, one for each distinct sequence; several options may end it differently."""
    # The context's length counts: it says which tokens are steered as a prompt's.
    wanted: dict[tuple[int, Tokens, Tokens], list[tuple[int, Tokens]]] = {}
    for row in rows:
        for option in row.options:
            key = (row.state, row.tokens[: row.prefix], option.targets[:-1])
            wanted.setdefault(key, []).append((option.index, option.targets))
    return [
        packed_row(context, [((), tails)], merge=True, state=state)
        for (state, context, _), tails in wanted.items()
    ]


def with_common_prefixes(rows: Sequence[PackedRow]) -> list[tuple[int, list[PackedRow]]]:
    """Split rows into sets whose contexts begin alike: (tokens in common, the rows).

    The last set holds the rows that share no such prefix, with 0 tokens. Prefixes are compared
    by token id, and belong to one state: keys and values depend on the vector. lm-eval often draws few-shot
    examples anew for each document, and then there are none.
    """
    sets: dict[tuple[int, Tokens], list[PackedRow]] = {}
    alone: list[PackedRow] = []
    for row in rows:
        if row.cached >= SHORTEST_PREFIX:
            sets.setdefault((row.state, row.tokens[:SHORTEST_PREFIX]), []).append(row)
        else:
            alone.append(row)
    found = []
    for members in sets.values():
        length = common_prefix([row.tokens[: row.prefix] for row in members])
        total = sum(row.cached for row in members)
        # Behind a prefix attention is no longer plainly causal, which costs long contexts more than
        # a short prefix saves.
        pays = length * (len(members) - 1) >= SMALLEST_GAIN and 4 * length * len(members) >= total
        if pays:
            found.append((length, members))
        else:
            alone += members
    return [*found, (0, alone)] if alone else found


def within_budget(items: Iterable[T], size: Callable[[T], tuple[int, int]], budget: int) -> Iterator[list[T]]:
    """Cut items, in order, so that rows x width stays within ``budget``; one by itself may exceed it.

    ``size`` says how many rows an item takes, and how wide.
    """
    chunk: list[T] = []
    rows = width = 0
    for item in items:
        more, wide = size(item)
        if chunk and (rows + more) * max(width, wide) > budget:
            yield chunk
            chunk, rows, width = [], 0, 0
        chunk.append(item)
        rows, width = rows + more, max(width, wide)
    if chunk:
        yield chunk


def shortest_and_longest(items: Iterable[T], length: Callable[[T], int]) -> list[T]:
    """The two items to check something on, or the only one, or none."""
    order = sorted(items, key=length)
    return [*order[:1], *order[1:][-1:]]


@dataclass
class Step:
    """One pass.

    Attributes:
        inputs: keyword arguments of the model: ``input_ids`` (rows, tokens), and under a tree mask
            ``attention_mask`` (rows, 1, tokens, columns + tokens; additive) and ``position_ids``.
        roles: (rows, tokens) what each token is; see `lm_eval_aft.steering.intervention`.
        scored: (R,) flat positions in rows x tokens whose logits are needed, ascending; none for contexts.
        options: (option, its places in ``scored``) that the logits answer.
        states: which vector steers each row; see `lm_eval_aft.steering.hooks.RowSteering`.
        at: the cache's rows that it fills; None without a cache.
        start: the cache's first column that it fills, or (rows, tokens) each row's columns.
        contexts: behind a cache, how many of its columns each row's context fills.
    """

    inputs: dict[str, Tensor]
    roles: Tensor
    scored: list[int] = field(default_factory=list)
    options: list[tuple[Option, list[int]]] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    at: Rows | None = None
    start: int | Tensor = 0
    contexts: list[int] = field(default_factory=list)


def step_over(
    rows: Sequence[PackedRow],
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    columns: int | None = None,
    width: int = 0,
) -> Step:
    """The pass that reads these rows, padded on the right to the longest or ``width``.

    Args:
        dtype: what the tree mask is made in; None makes none, for rows that attend causally.
        columns: of a cache, in which the rows' contexts, but for their last tokens, lie already.
    """
    skipped = [0 if columns is None else row.cached for row in rows]
    width = max([width, *(row.width - skip for row, skip in zip(rows, skipped, strict=True))])
    before = columns or 0
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    kinds = np.full((len(rows), width), PADDING)
    shape = (len(rows), width, before + width)
    visible = np.zeros(shape if dtype is not None else (len(rows), 0, 0), dtype=bool)
    # Padding sees itself, so that no row of the softmax is empty.
    visible[:, np.arange(visible.shape[1]), before + np.arange(visible.shape[1])] = True
    scored: list[int] = []
    options = []
    for r, (row, skip) in enumerate(zip(rows, skipped, strict=True)):
        ids[r, : row.width - skip] = row.tokens[skip:]
        ends = [*(run.start for run in row.runs[1:]), row.width]
        for run, stop in zip(row.runs, ends, strict=True):
            a, b, after = max(run.start - skip, 0), stop - skip, run.after - skip
            first = skip if run.after < 0 else positions[r, after] + 1
            positions[r, a:b] = np.arange(first, first + b - a)
            kinds[r, a:b] = run.role
            if dtype is not None:
                if run.after < 0:
                    visible[r, a:b, :skip] = True
                else:
                    visible[r, a:b] |= visible[r, after]
                visible[r, a:b, before + a : before + b] = np.tri(b - a, dtype=bool)
        kinds[r, [option.places[0] - skip for option in row.options]] = LAST
        places = sorted({place for option in row.options for place in option.places})
        known = {place: len(scored) + k for k, place in enumerate(places)}
        scored += [r * width + place - skip for place in places]
        options += [(option, [known[place] for place in option.places]) for option in row.options]
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    if dtype is not None:
        inputs["attention_mask"] = additive_mask(torch.from_numpy(visible), dtype).unsqueeze(1).to(device)
        inputs["position_ids"] = torch.from_numpy(positions).to(device)
    states = [row.state for row in rows]
    roles = torch.from_numpy(kinds).to(device)
    contexts = skipped if columns is not None else []
    return Step(inputs, roles, scored, options, states, start=before, contexts=contexts)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where ``visible``, else the least number of ``dtype``."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
