"""The training and selection parts of one or several tasks' training splits, without leaks between them."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import NAMES, borrowed, version
from lm_eval_aft.harness.examples import Example, Extractor
from lm_eval_aft.harness.tasks import evaluation_split, split_documents

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

logger = logging.getLogger(__name__)
DOC_HASH = "lm-eval: doc_hash of logged samples (lm_eval.utils.hash_string, handle_non_serializable)"

Keyed = tuple[int, dict[str, Any], str]  # id, document, key
# A few-shot document, and its keys however it is read.
FewshotDocument = tuple[dict[str, Any], frozenset[str]]
SELECTION_SEED = 1234  # the selection split and its prompts are the same for every seed


@dataclass
class Splits:
    """The training and selection parts of a task's training split.

    Attributes:
        selection: examples that layer, epoch and learning rate are chosen on.
        pool: documents that training may draw from.
        counts: what was dropped and why, and the sizes.
        selection_digest: SHA-256 over the selection documents' keys.
        selection_documents: the first 16 digits of each one's ``doc_hash`` in lm-eval, by which a
            report recognises them.
        share: how many documents show the same few-shot examples, where prompts have any.
        given: training examples that every seed gets, in this order, instead of drawing from the pool.
    """

    extractor: Extractor
    selection: list[Example]
    pool: list[Keyed]
    train_docs: int
    counts: dict[str, int]
    selection_digest: str
    selection_documents: tuple[str, ...] = ()
    share: int = 1
    given: list[Example] | None = None
    _fewshot: list[FewshotDocument] = field(repr=False, default_factory=list)
    _built: dict[int, Example | None] = field(repr=False, default_factory=dict)

    @property
    def drawn(self) -> int:
        """How many training documents a seed draws, at most."""
        return min(self.train_docs, len(self.pool)) if self.given is None else len(self.given)

    def train(self, seed: int) -> list[Example]:
        """The training examples that ``seed`` draws, in the order it draws them."""
        if self.given is not None:
            return list(self.given)
        groups = in_groups(self.pool, self.share)
        random.Random(seed).shuffle(groups)
        drawn: list[Example] = []
        for group in groups:
            for keyed in group:
                if keyed[0] not in self._built:
                    self._built[keyed[0]] = _build(self.extractor, keyed, group, self._fewshot)
                    if self._built[keyed[0]] is None:
                        self.counts["unusable"] = self.counts.get("unusable", 0) + 1
                example = self._built[keyed[0]]
                if example is not None:
                    drawn.append(example)
                if len(drawn) == self.train_docs:
                    return drawn
        return drawn


@dataclass
class DividedTask:
    """A task's training split in two parts, before any prompt is built; documents are (id, document, key).

    Attributes:
        chosen: the selection documents.
        pool: the documents that training may draw from.
        evaluation: keys of the evaluation split.
    """

    extractor: Extractor
    split: str
    chosen: list[Keyed]
    pool: list[Keyed]
    train_docs: int
    counts: dict[str, int]
    evaluation: set[str]


def split_task(
    extractor: Extractor,
    train_docs: int | None = None,
    selection_docs: int | None = None,
    *,
    train_split: str | None = None,
    most: tuple[int, int] = (500, 500),
    share: int = 1,
) -> Splits:
    """Divide a task's training split into a training pool and a selection split.

    Documents whose key occurs in the evaluation split, and duplicates, are dropped and counted. No
    few-shot context contains the document itself, a duplicate of it, a selection document or an
    evaluation document. Sizes that are not given are at most ``most`` (training, selection); of a smaller
    split, selection gets at most half. Every ``share`` documents show the same few-shot examples.

    Raises:
        AFTError: no training split, the evaluation split was asked for, or too few documents.
    """

    def sizes(available: int, split: str) -> tuple[int, int]:
        return _sizes(train_docs, selection_docs, available, most, split)

    return build_examples(divide(extractor, sizes, train_split), share=share)


def divide(
    extractor: Extractor,
    sizes: Callable[[int, str], tuple[int, int]],
    train_split: str | None = None,
    barred: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> DividedTask:
    """Choose a task's selection documents and its training pool.

    Args:
        sizes: numbers of training and selection documents, given how many there are and the split's name.
        barred: whether another task is evaluated on a document; such documents are dropped and counted.
    """
    task = extractor.task
    name = _training_split(task, train_split)
    evaluation = {extractor.key(doc) for doc in task.eval_docs}
    counts = {"split": 0, "evaluation_overlap": 0, "duplicates": 0, "unusable": 0}
    kept: dict[str, Keyed] = {}
    for doc_id, doc in enumerate(split_documents(task, name)):
        counts["split"] += 1
        key = extractor.key(doc)
        if key in evaluation or barred(doc):
            counts["evaluation_overlap"] += 1
        elif key in kept:
            counts["duplicates"] += 1
        else:
            kept[key] = (doc_id, doc, key)
    documents = list(kept.values())
    try:
        train_docs, selection_docs = sizes(len(documents), name)
    except AFTError as error:
        if len(documents) == counts["split"]:
            raise
        overlap, duplicates = counts["evaluation_overlap"], counts["duplicates"]
        raise AFTError(
            f"{error.what} Of its {counts['split']} documents, {overlap} were left out because an evaluation "
            f"split has them too, and {duplicates} because they occur before. Documents are the same if "
            "their questions and right answers read the same.",
            error.hint,
        ) from None
    random.Random(SELECTION_SEED).shuffle(documents)
    chosen, pool = documents[:selection_docs], documents[selection_docs:]
    return DividedTask(extractor, name, chosen, pool, train_docs, counts, evaluation)


def build_examples(
    divided: DividedTask, barred: Callable[[dict[str, Any]], bool] = lambda _: False, share: int = 1
) -> Splits:
    """Build a task's selection examples; no few-shot context contains a ``barred`` document."""
    extractor, counts, chosen, pool = divided.extractor, divided.counts, divided.chosen, divided.pool
    forbidden = divided.evaluation | {key for _, _, key in chosen}
    fewshot = _fewshot_pool(extractor, forbidden, pool, barred) if extractor.num_fewshot else []
    # With hardly more documents than few-shot examples, groups must be small to leave enough others.
    share = max(1, min(share, len(fewshot) - extractor.num_fewshot))
    selection = []
    for group in in_groups(chosen, share):
        for keyed in group:
            example = _build(extractor, keyed, group, fewshot)
            if example is None:
                counts["unusable"] += 1
            else:
                selection.append(example)
    if extractor.fault is not None:
        logger.warning(
            "Of %s, documents are left out whose prompts cannot be built: %s",
            extractor.task.config.task,
            extractor.fault.what,
        )
    if not selection and extractor.fault is not None:
        raise extractor.fault
    if not selection:
        raise AFTError(
            f"No document of split {divided.split!r} has a usable gold answer: right options beside wrong "
            "ones, or a text.",
            "Check the task's YAML, or choose another task.",
        )
    counts |= {"pool": len(pool), "selection": len(selection)}
    digest = hashlib.sha256("".join(key for _, _, key in chosen).encode()).hexdigest()
    if reason := NAMES[DOC_HASH].problem():
        logger.warning(
            "lm-eval %s may hash the documents that it logs in a way that is not known here (%s): reports "
            "may miss that this vector was chosen on a document that they contain.",
            version("lm-eval"),
            reason,
        )
    documents_chosen = tuple(_doc_hash(doc)[:16] for _, doc, _ in chosen)
    found = Splits(extractor, selection, pool, divided.train_docs, counts, digest, documents_chosen, share)
    found._fewshot = fewshot
    return found


def in_groups(documents: Sequence[Keyed], share: int) -> list[Sequence[Keyed]]:
    """Documents, in order, ``share`` at a time; the last group may be smaller."""
    return [documents[start : start + share] for start in range(0, len(documents), share)]


def _doc_hash(doc: dict[str, Any]) -> str:
    """``doc_hash`` as lm-eval logs it with samples (``lm_eval.evaluator.evaluate``)."""
    with borrowed(DOC_HASH):
        from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


def _training_split(task: ConfigurableTask, wanted: str | None) -> str:
    splits = ", ".join(map(str, task.dataset))
    reported = evaluation_split(task)
    if wanted is None:
        if not task.has_training_docs():
            raise AFTError(
                f"Task {task.config.task!r} has no training split; its data has: {splits} "
                f"(evaluation uses {reported!r}).",
                "Name another one with --train-split, but never the evaluation split.",
            )
        wanted = str(task.config.training_split)
    if wanted == reported:
        raise AFTError(
            f"{wanted!r} is the split on which {task.config.task!r} is evaluated; training on it would make "
            "every score worthless.",
            f"Its data has: {splits}.",
        )
    return wanted


def _sizes(
    train: int | None, selection: int | None, available: int, most: tuple[int, int], split: str
) -> tuple[int, int]:
    if available < 2:
        raise AFTError(
            f"Split {split!r} has {available} usable documents, too few to train and to choose on.",
            "Name another split with --train-split, or choose another task.",
        )
    if selection is None:
        share = available // 2 if train is None else available - train
        selection = min(most[1], share)
    if train is None:
        train = min(most[0], available - selection)
    if train < 1 or selection < 1 or train + selection > available:
        raise AFTError(
            f"{train} training and {selection} selection documents were asked for, but split {split!r} has "
            f"{available} usable ones.",
            "Lower --train-docs or --selection-docs.",
        )
    return train, selection


def _fewshot_pool(
    extractor: Extractor,
    forbidden: set[str],
    pool: list[Keyed],
    barred: Callable[[dict[str, Any]], bool],
) -> list[FewshotDocument]:
    """Documents that few-shot examples may be drawn from, with their keys, in the sampler's order."""
    needed, every = extractor.num_fewshot, list(extractor.task.sampler.fewshot_docs())
    # A task may read its few-shot examples by other fields, which give the same document another key.
    shown = [(doc, frozenset((extractor.key(doc), extractor.key(doc, fewshot=True)))) for doc in every]
    allowed = [(doc, keys) for doc, keys in shown if not keys & forbidden and not barred(doc)]
    if len(allowed) >= needed:
        return allowed
    if len(pool) <= needed:
        raise AFTError(
            f"Only {len(pool)} documents are left to draw {needed} few-shot examples from.",
            "Lower --num-fewshot or --selection-docs.",
        )
    logger.warning(
        "%s: of the %d documents that few-shot examples come from, %d are for evaluation or selection; "
        "training shows examples from the training documents instead.",
        extractor.task.config.task,
        len(every),
        len(every) - len(allowed),
    )
    return [(doc, frozenset((key,))) for _, doc, key in pool]


def _build(
    extractor: Extractor, keyed: Keyed, group: Sequence[Keyed], fewshot: Sequence[FewshotDocument]
) -> Example | None:
    """A document's example; all documents of its ``group`` show the same few-shot examples, from outside it.

    ``None`` where it has no usable gold answer, or too few few-shot examples are left.
    """
    doc_id, doc, _ = keyed
    if not extractor.num_fewshot:
        return extractor.example(doc, doc_id)
    task = extractor.task
    own = {key for _, _, key in group}
    # A sampler of the task's class, seeded by the group's first document, so that neither the order of
    # documents nor the seed of a run changes a prompt.
    seed = hashlib.sha256(f"{SELECTION_SEED}|{group[0][2]}".encode()).digest()
    original = task.sampler
    others = [other for other, keys in fewshot if not keys & own]
    if len(others) < extractor.num_fewshot:
        return _build(extractor, keyed, [keyed], fewshot) if len(group) > 1 else None
    task.sampler = type(original)(others, rnd=int.from_bytes(seed[:8], "big"))
    try:
        example = extractor.example(doc, doc_id)
    finally:
        task.sampler = original
    return example and replace(example, group=group[0][0] if len(group) > 1 else None)


# Several tasks: no document leaks from one into another.

TemplateKey = tuple[int, str]  # which task's templates read a document, and its key by them


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
    *,
    train_docs: int | None = None,
    selection_docs: int | None = None,
    train_split: str | None = None,
    most: tuple[int, int] = (500, 500),
    share: int = 1,
) -> MixedSplits:
    """Divide every task's training split as `split_task` does, without leaks between the tasks.

    No task trains or selects on another's evaluation documents, trains on another's selection
    documents, or shows either in a few-shot context. Two tasks' documents are the same when any task's
    templates render them alike.

    ``train_docs`` and ``selection_docs`` are totals (``most`` where they are not given), divided evenly;
    the remainder goes to the first tasks, one document each. A task with fewer documents than its
    shares divides those it has in the same proportion, with a warning; the others' shares stay.

    Raises:
        AFTError: fewer documents than tasks, or as `split_task`.
    """
    count = len(extractors)
    train = _divided(most[0] if train_docs is None else train_docs, count, "train-docs")
    selection = _divided(most[1] if selection_docs is None else selection_docs, count, "selection-docs")
    dedup = CrossTaskDedup(extractors)
    evaluation = [dedup.identities(i, list(each.task.eval_docs)) for i, each in enumerate(extractors)]
    divided = []
    for i, extractor in enumerate(extractors):
        barred = dedup.among(_others(evaluation, i))
        divided.append(divide(extractor, _sizer((train[i], selection[i]), names[i]), train_split, barred))
    chosen = [dedup.identities(i, [doc for _, doc, _ in each.chosen]) for i, each in enumerate(divided)]
    parts = []
    for i, each in enumerate(divided):
        _drop_from_pool(each, dedup.among(_others(chosen, i)))
        parts.append(build_examples(each, dedup.among(_others(evaluation, i) | _others(chosen, i)), share))
    for name, part, wanted in zip(names, parts, zip(train, selection, strict=True), strict=True):
        _warn_if_short(name, part, wanted)
    return MixedSplits(parts, _tagged([part.selection for part in parts]))


class CrossTaskDedup:
    """Finds documents that several tasks share, whatever each task calls its fields."""

    def __init__(self, extractors: Sequence[Extractor]) -> None:
        self.extractors = list(extractors)

    def identities(self, owner: int, documents: Sequence[dict[str, Any]]) -> set[TemplateKey]:
        """The keys of one task's documents by every task's templates.

        Another task's templates are left out where they render all of these documents alike.
        """
        found: set[TemplateKey] = set()
        for reader in range(len(self.extractors)):
            keys = [self._key(reader, doc) for doc in documents]
            read = {key for key in keys if key is not None}
            if reader == owner or len(read) > 1 or len(documents) == 1:
                found |= {(reader, key) for key in read}
        return found

    def among(self, identities: set[TemplateKey]) -> Callable[[dict[str, Any]], bool]:
        """A function that says whether a document is one of those."""

        def known(doc: dict[str, Any]) -> bool:
            return any(
                (reader, self._key(reader, doc)) in identities for reader in range(len(self.extractors))
            )

        return known

    def _key(self, reader: int, doc: dict[str, Any]) -> str | None:
        try:
            return self.extractors[reader].key(doc)
        except Exception:  # another task's templates and functions may fail in any way on this document
            return None


def _others(sets: Sequence[set[TemplateKey]], index: int) -> set[TemplateKey]:
    return set().union(*(each for i, each in enumerate(sets) if i != index))


def _divided(total: int, count: int, what: str) -> list[int]:
    if total < count:
        raise AFTError(
            f"--{what} {total} is less than one document for each of {count} tasks.", f"Raise --{what}."
        )
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


def _drop_from_pool(divided: DividedTask, barred: Callable[[dict[str, Any]], bool]) -> None:
    kept = [each for each in divided.pool if not barred(each[1])]
    divided.counts["other_selection"] = len(divided.pool) - len(kept)
    divided.pool = kept


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


class _OfTask(Protocol):
    @property
    def task(self) -> int: ...


T = TypeVar("T", bound=_OfTask)


def interleaved(items: Sequence[T]) -> list[T]:
    """Items (examples or documents) with their tasks spread evenly, each task's in their order.

    Item ``j`` of a task's ``n`` is placed at ``(j + 1/2) / n``: tasks with equally many items
    alternate, a smaller one is spread over the whole. The items of a single task stay as they are.
    """
    counts = Counter(item.task for item in items)
    seen: Counter[int] = Counter()
    places = []
    for item in items:
        places.append(((seen[item.task] + 0.5) / counts[item.task], item.task))
        seen[item.task] += 1
    return [items[i] for i in sorted(range(len(items)), key=places.__getitem__)]
