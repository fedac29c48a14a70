"""The train and selection parts of several tasks, with no way for an answer to leak from one into another."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.training.examples import Example, Extractor
from lm_eval_aft.training.mixture import interleaved
from lm_eval_aft.training.splits import Carved, Splits, carve, prompted

logger = logging.getLogger(__name__)
Identity = tuple[int, str]  # which task's templates read a document, and its key by them


@dataclass
class MixedSplits:
    """The splits of several tasks, as one.

    Attributes:
        parts: the tasks' own, in order.
        selection: all selection examples, their tasks interleaved: any first part of them is a fair mix.
    """

    parts: list[Splits]
    selection: list[Example]

    @property
    def train_docs(self) -> int:
        """Training documents asked for, or what there is of them."""
        return sum(part.train_docs for part in self.parts)

    @property
    def drawn(self) -> int:
        """How many training documents a seed draws, at most."""
        return sum(part.drawn for part in self.parts)

    @property
    def counts(self) -> dict[str, int]:
        """Sums over the tasks of what was dropped and why, and of the sizes."""
        names = dict.fromkeys(key for part in self.parts for key in part.counts)
        return {name: sum(part.counts.get(name, 0) for part in self.parts) for name in names}

    @property
    def selection_digest(self) -> str:
        """SHA-256 over the tasks' own digests."""
        return hashlib.sha256("".join(part.selection_digest for part in self.parts).encode()).hexdigest()

    @property
    def selection_documents(self) -> tuple[str, ...]:
        """The tasks' own, one after the other."""
        return tuple(each for part in self.parts for each in part.selection_documents)

    def train(self, seed: int) -> list[Example]:
        """The training examples that ``seed`` draws from every task, the tasks interleaved."""
        return _tagged([part.train(seed) for part in self.parts])


def split_tasks(
    extractors: Sequence[Extractor],
    names: Sequence[str],
    train_docs: int | None = None,
    selection_docs: int | None = None,
    train_split: str | None = None,
    most: tuple[int, int] = (500, 500),
    share: int = 1,
) -> MixedSplits:
    """Carve every task's training split as `split_task` does, and keep the tasks apart from each other.

    No task trains or selects on another's evaluation documents, trains on another's selection
    documents, or shows either in a few-shot context. Two tasks' documents are the same when any task's
    templates read them alike.

    ``train_docs`` and ``selection_docs`` are totals (``most`` where they are not given), dealt evenly;
    what division leaves goes to the first tasks, a document each. A task with fewer documents than its
    shares divides those it has in the same proportion, and a warning says so; the others' shares stay.

    Raises:
        AFTError: fewer documents than tasks asked for, or as `split_task`.
    """
    count = len(extractors)
    train = _dealt(most[0] if train_docs is None else train_docs, count, "train-docs")
    selection = _dealt(most[1] if selection_docs is None else selection_docs, count, "selection-docs")
    kin = Kin(extractors)
    evaluation = [kin.identities(i, list(each.task.eval_docs)) for i, each in enumerate(extractors)]
    carved = []
    for i, extractor in enumerate(extractors):
        barred = kin.among(_others(evaluation, i))
        carved.append(carve(extractor, _sizer((train[i], selection[i]), names[i]), train_split, barred))
    chosen = [kin.identities(i, [doc for _, doc, _ in each.chosen]) for i, each in enumerate(carved)]
    parts = []
    for i, each in enumerate(carved):
        _drop_from_pool(each, kin.among(_others(chosen, i)))
        parts.append(prompted(each, kin.among(_others(evaluation, i) | _others(chosen, i)), share))
    for name, part, wanted in zip(names, parts, zip(train, selection, strict=True), strict=True):
        _warn_if_short(name, part, wanted)
    return MixedSplits(parts, _tagged([part.selection for part in parts]))


class Kin:
    """Tells which documents of several tasks are the same one, whatever each task calls its fields."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        self.extractors = list(extractors)

    def identities(self, owner: int, documents: Sequence[dict[str, Any]]) -> set[Identity]:
        """All that the tasks' templates make of one task's documents.

        Templates of another task that read all of them alike tell nothing, and are left out.
        """
        found: set[Identity] = set()
        for reader in range(len(self.extractors)):
            keys = [self._key(reader, doc) for doc in documents]
            read = {key for key in keys if key is not None}
            if reader == owner or len(read) > 1 or len(documents) == 1:
                found |= {(reader, key) for key in read}
        return found

    def among(self, identities: set[Identity]) -> Callable[[dict[str, Any]], bool]:
        """Tells whether a document is one of those."""

        def known(doc: dict[str, Any]) -> bool:
            return any(
                (reader, self._key(reader, doc)) in identities for reader in range(len(self.extractors))
            )

        return known

    def _key(self, reader: int, doc: dict[str, Any]) -> str | None:
        try:
            return self.extractors[reader].key(doc)
        except Exception:  # another task's templates and functions may fail in any way on these fields
            return None


def _others(sets: Sequence[set[Identity]], index: int) -> set[Identity]:
    return set().union(*(each for i, each in enumerate(sets) if i != index))


def _dealt(total: int, count: int, what: str) -> list[int]:
    if total < count:
        raise AFTError(f"{total} {what} cannot be dealt to {count} tasks.", f"Raise --{what}.")
    return [total // count + (i < total % count) for i in range(count)]


def _sizer(wanted: tuple[int, int], name: str) -> Callable[[int, str], tuple[int, int]]:
    train, selection = wanted

    def sizes(available: int, split: str) -> tuple[int, int]:
        if train + selection <= available:
            return train, selection
        if available < 2:
            raise AFTError(
                f"Split {split!r} of {name!r} has {available} usable documents, too few for both parts.",
                "Leave the task out.",
            )
        share = min(available - 1, max(1, available * selection // (train + selection)))
        return available - share, share

    return sizes


def _drop_from_pool(carved: Carved, barred: Callable[[dict[str, Any]], bool]) -> None:
    kept = [each for each in carved.pool if not barred(each[1])]
    carved.counts["other_selection"] = len(carved.pool) - len(kept)
    carved.pool = kept


def _warn_if_short(name: str, part: Splits, wanted: tuple[int, int]) -> None:
    if not part.pool:
        raise AFTError(f"No document of {name!r} is left to train on.", "Lower --selection-docs.")
    if part.drawn < wanted[0] or len(part.selection) < wanted[1]:
        logger.warning(
            "%s has only %d training and %d selection documents for its shares of %d and %d; the other tasks "
            "keep theirs.",
            *(name, part.drawn, len(part.selection), *wanted),
        )


def _tagged(parts: Sequence[Sequence[Example]]) -> list[Example]:
    return interleaved([replace(each, task=i) for i, part in enumerate(parts) for each in part])
