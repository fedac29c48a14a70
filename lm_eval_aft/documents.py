"""Documents as token ids, and how they are laid out in rows for a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]
# A prefix shorter than this is not worth a row that several documents share.
WORTH_SHARING = 32
# A shared row may hold this many token budgets, since its documents would take many more by themselves,
# and this many tokens, since its mask grows with their square.
SHARED_BUDGETS, SHARED_TOKENS = 4, 4096


@dataclass(frozen=True)
class Document:
    """Token ids of one document: ``pairs`` of (context, continuation), one per option.

    Neither part is empty. ``gold`` holds the indices of the right options and ``lengths`` each
    option's length in characters (the unit lm-eval normalises by). ``task`` numbers the tasks of a mixture.
    Documents of one task and one ``group`` have prompts that begin alike (the same few-shot examples).
    """

    pairs: tuple[tuple[Tokens, Tokens], ...]
    gold: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)
    task: int = 0
    group: int | None = None

    def groups(self) -> dict[Tokens, list[int]]:
        """Option indices by context: usually one context shared by all options."""
        found: dict[Tokens, list[int]] = {}
        for index, (context, _) in enumerate(self.pairs):
            found.setdefault(context, []).append(index)
        return found

    def tokens(self, packed: bool) -> int:
        """Length of the longest row this document needs by itself, in tokens."""
        return max(row.width for row in lay_out([self], packed))

    def rows(self, packed: bool) -> int:
        """How many rows this document needs by itself."""
        return len(self.groups()) if packed else len(self.pairs)


@dataclass(frozen=True)
class Branch:
    """What follows a row's prefix for one document: the rest of its context, and continuations.

    ``tails`` are (option, numbered through the batch; its tokens). Each sees the prefix, ``rest`` and itself.
    """

    rest: Tokens
    tails: tuple[tuple[int, Tokens], ...]

    @property
    def width(self) -> int:
        """Tokens it takes; the last one of a continuation is only predicted."""
        return len(self.rest) + sum(len(tail) - 1 for _, tail in self.tails)


@dataclass(frozen=True)
class Row:
    """A prefix that every branch sees, and branches that do not see each other."""

    prefix: Tokens
    branches: tuple[Branch, ...]

    @property
    def width(self) -> int:
        """Tokens it takes."""
        return len(self.prefix) + sum(branch.width for branch in self.branches)


def lay_out(documents: Sequence[Document], packed: bool) -> list[Row]:
    """The rows that documents need, in order of their first document.

    Packed, a document's options with one context share a row, and so do documents of one group. A row
    that is not packed is one context with one continuation.
    """
    first, starts = 0, []
    for document in documents:
        starts.append(first)
        first += len(document.pairs)
    if not packed:
        return [
            Row(context, (Branch((), ((start + i, tail),)),))
            for start, document in zip(starts, documents, strict=True)
            for i, (context, tail) in enumerate(document.pairs)
        ]
    rows = []
    for unit in units(documents):
        contexts: list[tuple[Tokens, tuple[tuple[int, Tokens], ...]]] = []
        for place in unit:
            document, start = documents[place], starts[place]
            for context, options in document.groups().items():
                tails = tuple((start + i, document.pairs[i][1]) for i in options)
                contexts.append((context, tails))
        shared = _common([context for context, _ in contexts]) if len(unit) > 1 else 0
        if shared >= WORTH_SHARING:
            prefix = contexts[0][0][:shared]
            rows.append(Row(prefix, tuple(Branch(context[shared:], tails) for context, tails in contexts)))
        else:
            rows += [Row(context, (Branch((), tails),)) for context, tails in contexts]
    return rows


def units(documents: Sequence[Document]) -> list[list[int]]:
    """Indices of documents that belong together: those of one group, and each other one by itself."""
    found: dict[tuple[int, int | None, int], list[int]] = {}
    for index, document in enumerate(documents):
        alone = -1 if document.group is not None else index
        found.setdefault((document.task, document.group, alone), []).append(index)
    return list(found.values())


def _common(contexts: Sequence[Tokens]) -> int:
    """How many first tokens all contexts share, each keeping at least one of its own."""
    first = contexts[0]
    limit = min(len(context) for context in contexts) - 1
    for at in range(limit):
        token = first[at]
        if any(context[at] != token for context in contexts):
            return at
    return limit


def token_budget_batches(
    documents: Sequence[Document], packed: bool, budget: int
) -> Iterator[tuple[int, ...]]:
    """Cut documents into batches, by index, so that rows x width stays within ``budget``.

    Documents keep their order, but for those of a group, which are brought together. A document that
    alone exceeds the budget gets a batch of its own, and a group whose row would be longer than
    `SHARED_BUDGETS` and `SHARED_TOKENS` allow is cut in pieces.
    """
    batch: list[int] = []
    rows = width = 0
    for piece in _pieces(documents, packed, budget):
        needed = lay_out([documents[i] for i in piece], packed)
        widest = max(row.width for row in needed)
        if batch and (rows + len(needed)) * max(width, widest) > budget:
            yield tuple(batch)
            batch, rows, width = [], 0, 0
        batch += piece
        rows, width = rows + len(needed), max(width, widest)
    if batch:
        yield tuple(batch)


def _pieces(documents: Sequence[Document], packed: bool, budget: int) -> Iterator[list[int]]:
    """Documents whose rows cannot be told apart without losing what they share."""
    limit = min(SHARED_BUDGETS * budget, SHARED_TOKENS)
    for unit in units(documents) if packed else [[i] for i in range(len(documents))]:
        piece: list[int] = []
        for index in unit:
            longer = lay_out([documents[i] for i in [*piece, index]], packed)
            if piece and (len(longer) > 1 or longer[0].width > limit):
                yield piece
                piece = []
            piece.append(index)
        yield piece
