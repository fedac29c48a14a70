"""Training examples: documents of any harness task, prompted by lm-eval's own code."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.harness import TRAINABLE, evaluation_split, set_num_fewshot, split_documents
from lm_eval_aft.packing import Document

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

SELECTION_SEED = 1234  # the selection split and its prompts are the same for every seed


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are built; the same meaning as lm-eval's flags of these names.

    ``fewshot_as_multiturn`` of ``None`` follows lm-eval: on with a chat template, else off.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None


@dataclass(frozen=True)
class Example:
    """One prompted document.

    Attributes:
        doc_id: index of the document in its split.
        requests: (context, continuation) strings, exactly as the harness would send them; one
            per option, or the gold continuation alone for generation.
        gold: indices of the right requests.
        lengths: option lengths in characters, as acc_norm counts them.
    """

    doc_id: int
    requests: tuple[tuple[str, str], ...]
    gold: tuple[int, ...]
    lengths: tuple[float, ...]


class Extractor:
    """Turns documents of one task into `Example`s through the task's own methods."""

    def __init__(self, task: ConfigurableTask, lm: HFLM, settings: PromptSettings) -> None:
        if task.OUTPUT_TYPE not in TRAINABLE:
            raise AFTError(
                f"Task {task.config.task!r} is of type {task.OUTPUT_TYPE!r}, which cannot be trained on.",
                f"Trainable types: {', '.join(TRAINABLE)}.",
            )
        self.task = task
        self.settings = settings
        self.num_fewshot = set_num_fewshot(task, settings.num_fewshot)
        self.objective = TRAINABLE[task.OUTPUT_TYPE]
        self._chat_template = lm.apply_chat_template if settings.apply_chat_template else None
        multiturn = settings.fewshot_as_multiturn
        self._multiturn = settings.apply_chat_template if multiturn is None else multiturn

    def requests(self, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
        """The arguments of the harness's own requests for this document."""
        context = self.task.fewshot_context(
            doc,
            num_fewshot=self.num_fewshot,
            system_instruction=self.settings.system_instruction,
            apply_chat_template=self.settings.apply_chat_template,
            fewshot_as_multiturn=self._multiturn,
            chat_template=self._chat_template,
            gen_prefix=self.task.doc_to_prefix(doc),
        )
        built = self.task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(self.task.config["task"], 0, 1),
            apply_chat_template=self.settings.apply_chat_template,
            chat_template=self._chat_template,
        )
        return [instance.args for instance in (built if isinstance(built, list) else [built])]

    def example(self, doc: dict[str, Any], doc_id: int) -> Example | None:
        """The example for a document, or ``None`` where it has no usable gold answer."""
        requests = self.requests(doc)
        if self.objective == "lm":
            target = self._target_text(doc)
            if not target:
                return None
            context = requests[0][0]
            continuation = self._delimiter(doc) + target
            if self.task.OUTPUT_TYPE == "loglikelihood":
                continuation = requests[0][1]
            return Example(doc_id, ((context, continuation),), (0,), (float(len(target)),))
        choices = self.task.doc_to_choice(doc)
        # Tasks that score mutual information append requests without context: not options.
        pairs = tuple((str(context), str(tail)) for context, tail, *_ in requests[: len(choices)])
        gold = self._gold(doc, choices)
        if not gold or len(pairs) < 2:
            return None
        return Example(doc_id, pairs, gold, tuple(float(max(1, len(choice))) for choice in choices))

    def key(self, doc: dict[str, Any], fewshot: bool = False) -> str:
        """A hash that duplicates share: the question, and for choices the gold answer too.

        Case and white space do not count. With ``fewshot`` the document is read through the
        task's few-shot fields, where it has any.
        """
        config = self.task.fewshot_cfg if fewshot else None
        try:
            text = self.task.doc_to_text(doc, config.doc_to_text if config else None)
            parts = [str(text)]
            if self.objective == "choice":
                choices = self.task.doc_to_choice(doc, config.doc_to_choice if config else None)
                gold = self._gold(doc, choices)
                parts = [*(sorted(choices) if isinstance(text, int) else parts), *(choices[i] for i in gold)]
            elif not parts[0].strip():
                parts.append(self._target_text(doc))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            parts = [json.dumps(doc, sort_keys=True, default=str)]
        normal = "\x1f".join(" ".join(part.casefold().split()) for part in parts)
        return hashlib.sha256(normal.encode()).hexdigest()

    def _gold(self, doc: dict[str, Any], choices: Sequence[str]) -> tuple[int, ...]:
        gold = self.task.doc_to_text(doc) if self.task.multiple_input else self.task.doc_to_target(doc)
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else -1
        indices = gold if isinstance(gold, list) else [gold]
        return tuple(i for i in indices if isinstance(i, int) and 0 <= i < len(choices))

    def _target_text(self, doc: dict[str, Any]) -> str:
        target = self.task.doc_to_target(doc)
        if isinstance(target, int) and self.task.config.doc_to_choice is not None:
            target = self.task.doc_to_choice(doc)[target]
        if isinstance(target, list):
            target = target[0] if target else ""
        return str(target)

    def _delimiter(self, doc: dict[str, Any]) -> str:
        # As the harness joins a few-shot answer to its question; a chat turn starts clean.
        prefix = self.task.doc_to_prefix(doc)
        if prefix:
            return "" if str(prefix)[-1:].isspace() else " "
        return "" if self.settings.apply_chat_template else str(self.task.config.target_delimiter)


@dataclass
class Splits:
    """The train and selection parts of a task's training split.

    Attributes:
        selection: examples that layer, epoch and learning rate are chosen on.
        pool: documents training may draw from, by id.
        counts: what was dropped and why, and the sizes.
        selection_digest: SHA-256 over the selection documents' keys.
    """

    extractor: Extractor
    selection: list[Example]
    pool: list[tuple[int, dict[str, Any], str]]
    train_docs: int
    counts: dict[str, int]
    selection_digest: str
    _fewshot: list[tuple[dict[str, Any], str]] = field(repr=False, default_factory=list)
    _built: dict[int, Example | None] = field(repr=False, default_factory=dict)

    def train(self, seed: int) -> list[Example]:
        """The training examples that ``seed`` draws, in the order it draws them."""
        order = list(range(len(self.pool)))
        random.Random(seed).shuffle(order)
        drawn: list[Example] = []
        for index in order:
            doc_id, doc, key = self.pool[index]
            if doc_id not in self._built:
                self._built[doc_id] = _build(self.extractor, doc, doc_id, key, self._fewshot)
            example = self._built[doc_id]
            if example is not None:
                drawn.append(example)
            if len(drawn) == self.train_docs:
                break
        return drawn


def split_task(
    extractor: Extractor,
    train_docs: int | None = None,
    selection_docs: int | None = None,
    train_split: str | None = None,
    default_docs: int = 500,
) -> Splits:
    """Carve a train pool and a selection split out of a task's training split.

    Documents whose key occurs in the evaluation split, and repeats, are dropped and counted. No
    few-shot context contains the document itself, a duplicate of it, a selection document or an
    evaluation document. Sizes not given default to ``default_docs`` each, or to an equal share of
    a smaller split.

    Raises:
        AFTError: no training split, the evaluation split was asked for, or too few documents.
    """
    task = extractor.task
    name = _training_split(task, train_split)
    evaluation = {extractor.key(doc) for doc in task.eval_docs}
    counts = {"split": 0, "evaluation_overlap": 0, "duplicates": 0, "unusable": 0}
    kept: dict[str, tuple[int, dict[str, Any], str]] = {}
    for doc_id, doc in enumerate(split_documents(task, name)):
        counts["split"] += 1
        key = extractor.key(doc)
        if key in evaluation:
            counts["evaluation_overlap"] += 1
        elif key in kept:
            counts["duplicates"] += 1
        else:
            kept[key] = (doc_id, doc, key)
    documents = list(kept.values())
    train_docs, selection_docs = _sizes(train_docs, selection_docs, len(documents), default_docs, name)
    random.Random(SELECTION_SEED).shuffle(documents)
    chosen, pool = documents[:selection_docs], documents[selection_docs:]
    forbidden = evaluation | {key for _, _, key in chosen}
    fewshot = _fewshot_pool(extractor, forbidden, pool) if extractor.num_fewshot else []
    selection = []
    for doc_id, doc, key in chosen:
        example = _build(extractor, doc, doc_id, key, fewshot)
        if example is None:
            counts["unusable"] += 1
        else:
            selection.append(example)
    if not selection:
        raise AFTError(f"No document of split {name!r} has a usable gold answer.", "Check the task's YAML.")
    counts |= {"pool": len(pool), "selection": len(selection)}
    digest = hashlib.sha256("".join(key for _, _, key in chosen).encode()).hexdigest()
    return Splits(extractor, selection, pool, train_docs, counts, digest, fewshot)


def encode(examples: Iterable[Example], lm: HFLM) -> list[Document]:
    """Token ids of examples, split and cut on the left exactly as ``hf`` would."""
    documents = []
    limit = lm.max_length
    for example in examples:
        pairs = []
        for context, continuation in example.requests:
            if context == "":
                tail = lm.tok_encode(continuation, add_special_tokens=False)
                prefix = lm.prefix_token_id
                head, tail = ([prefix], tail) if prefix != tail[0] else (tail[:1], tail[1:])
            else:
                head, tail = lm._encode_pair(context, continuation)
            tail = tail[:limit]
            # Room for one token more than the window: the last one is only predicted.
            pairs.append((tuple(head[-(limit + 1 - len(tail)) :]), tuple(tail)))
        documents.append(Document(tuple(pairs), example.gold, example.lengths))
    return documents


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
    train: int | None, selection: int | None, available: int, default: int, split: str
) -> tuple[int, int]:
    share = default if available >= 2 * default else available // 2
    if selection is None:
        selection = min(share, available - (train or 0)) if train is not None else share
    if train is None:
        train = min(default, available - selection)
    if train < 1 or selection < 1 or train + selection > available:
        raise AFTError(
            f"{train} training and {selection} selection documents were asked for, but split {split!r} has "
            f"{available} usable ones.",
            "Lower --train-docs or --selection-docs.",
        )
    return train, selection


def _fewshot_pool(
    extractor: Extractor, forbidden: set[str], pool: list[tuple[int, dict[str, Any], str]]
) -> list[tuple[dict[str, Any], str]]:
    """Documents few-shot examples may come from, with their keys, in the sampler's order."""
    sampler = extractor.task.sampler
    keyed = [(doc, extractor.key(doc, fewshot=True)) for doc in sampler.fewshot_docs()]
    allowed = [(doc, key) for doc, key in keyed if key not in forbidden]
    if len(allowed) <= extractor.num_fewshot:  # the task draws from its evaluation split
        allowed = [(doc, key) for _, doc, key in pool]
    if len(allowed) <= extractor.num_fewshot:
        raise AFTError(
            f"Only {len(allowed)} documents are left to draw {extractor.num_fewshot} few-shot examples from.",
            "Lower --num-fewshot or --selection-docs.",
        )
    return allowed


def _build(
    extractor: Extractor,
    doc: dict[str, Any],
    doc_id: int,
    key: str,
    fewshot: list[tuple[dict[str, Any], str]],
) -> Example | None:
    if not extractor.num_fewshot:
        return extractor.example(doc, doc_id)
    task = extractor.task
    # A sampler of the task's own class, seeded by the document, so that neither the order
    # of documents nor the seed of a run changes a prompt.
    draw = int.from_bytes(hashlib.sha256(f"{SELECTION_SEED}|{key}".encode()).digest()[:8], "big")
    original = task.sampler
    task.sampler = type(original)([other for other, its_key in fewshot if its_key != key], rnd=draw)
    try:
        return extractor.example(doc, doc_id)
    finally:
        task.sampler = original
