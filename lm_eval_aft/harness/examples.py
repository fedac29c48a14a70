"""Training examples: documents of any harness task, prompted by lm-eval's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import borrowed
from lm_eval_aft.engine.batching import Document
from lm_eval_aft.harness.tasks import NOT_TEXT, TRAINABLE, set_num_fewshot

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are built; the same meaning as lm-eval's flags of these names.

    ``fewshot_as_multiturn`` of ``None`` follows lm-eval: on with a chat template, else off.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    def flags(self) -> list[str]:
        """The same prompts, asked of ``lm_eval run``."""
        found = [] if self.num_fewshot is None else ["--num_fewshot", str(self.num_fewshot)]
        if self.system_instruction:
            found += ["--system_instruction", self.system_instruction]
        if self.apply_chat_template:
            found.append("--apply_chat_template")
        if self.fewshot_as_multiturn is not None:
            found += ["--fewshot_as_multiturn", str(self.fewshot_as_multiturn)]
        return found


PROMPTS = tuple(each.name for each in fields(PromptSettings))


@dataclass(frozen=True)
class Example:
    """One prompted document.

    Attributes:
        doc_id: index of the document in its split.
        requests: (context, continuation) strings, exactly as the harness would send them; one
            per option, or the gold continuation alone for generation.
        gold: indices of the right requests.
        lengths: option lengths in characters, as acc_norm counts them.
        task: which task it is of, where several are trained on.
        group: what examples that show the same few-shot examples have in common.
        doc: the document itself.
    """

    doc_id: int
    requests: tuple[tuple[str, str], ...]
    gold: tuple[int, ...]
    lengths: tuple[float, ...]
    task: int = 0
    group: int | None = None
    doc: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Extractor:
    """Turns documents of one task into `Example`s through the task's own methods."""

    def __init__(self, task: ConfigurableTask, lm: HFLM, settings: PromptSettings) -> None:
        if task.OUTPUT_TYPE not in TRAINABLE:
            raise AFTError(
                f"Task {task.config.task!r} is of type {task.OUTPUT_TYPE!r}, which cannot be trained on.",
                f"Trainable types: {', '.join(TRAINABLE)}.",
            )
        if any(getattr(task.config, f"doc_to_{kind}", None) for kind in NOT_TEXT):
            raise AFTError(
                f"The prompts of task {task.config.task!r} hold images or sounds.",
                "Vectors are trained on text: choose a task of text alone.",
            )
        self.task = task
        self.settings = settings
        self.num_fewshot = set_num_fewshot(task, settings.num_fewshot)
        self.objective = TRAINABLE[task.OUTPUT_TYPE]
        self._chat_template = lm.apply_chat_template if settings.apply_chat_template else None
        multiturn = settings.fewshot_as_multiturn
        self._multiturn = settings.apply_chat_template if multiturn is None else multiturn

    def requests(self, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
        """The arguments of the harness's own requests for this document.

        Raises:
            AFTError: the task's own templates or functions fail on it.
        """
        try:
            return self._requests(doc)
        except Exception as error:  # whatever a template or a function of the task makes of a document
            why = (str(error).strip().splitlines() or ["no message"])[0]
            raise AFTError(
                f"lm-eval cannot build a prompt of {self.task.config.task!r}: {type(error).__name__}, {why}",
                "Check the fields that its YAML names against a document, and try --num-fewshot 0.",
            ) from error

    def _requests(self, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
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
            return Example(doc_id, ((context, continuation),), (0,), (float(len(target)),), doc=doc)
        choices = self.task.doc_to_choice(doc)
        # Tasks that score mutual information append requests without context: not options.
        pairs = tuple((str(context), str(tail)) for context, tail, *_ in requests[: len(choices)])
        gold = self._gold(doc, choices)
        if not gold or len(set(gold)) == len(pairs):
            return None  # nothing to choose
        lengths = tuple(float(max(1, len(choice))) for choice in choices)
        return Example(doc_id, pairs, gold, lengths, doc=doc)

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
                right = sorted(choices[i] for i in gold)
                parts = [*(sorted(choices) if isinstance(text, int) else parts), *right]
            elif not parts[0].strip():
                parts.append(self._target_text(doc))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError):
            parts = [json.dumps(doc, sort_keys=True, default=str)]
        normal = "\x1f".join(" ".join(part.casefold().split()) for part in parts)
        return hashlib.sha256(normal.encode()).hexdigest()

    def _gold(self, doc: dict[str, Any], choices: Sequence[str]) -> tuple[int, ...]:
        gold = self.task.doc_to_text(doc) if self.task.multiple_input else self.task.doc_to_target(doc)
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else -1
        indices = gold if isinstance(gold, list) else [gold]
        # numpy's integers too, which the harness takes as well.
        return tuple(int(i) for i in indices if isinstance(i, Integral) and 0 <= int(i) < len(choices))

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


def encode(examples: Iterable[Example], lm: HFLM) -> list[Document]:
    """Token ids of examples, split and cut on the left exactly as ``hf`` would."""
    documents = []
    limit = lm.max_length
    with borrowed("lm-eval: HFLM._encode_pair"):
        split = lm._encode_pair
    for example in examples:
        pairs = []
        for context, continuation in example.requests:
            if context == "":
                tail = lm.tok_encode(continuation, add_special_tokens=False)
                prefix = lm.prefix_token_id
                head, tail = ([prefix], tail) if prefix != tail[0] else (tail[:1], tail[1:])
            else:
                head, tail = split(context, continuation)
            if not tail:
                raise AFTError(
                    f"The tokenizer makes nothing of {continuation!r} (document {example.doc_id}).",
                    "Check that it is the model's own, or give another: --model-args tokenizer=...",
                )
            tail = tail[:limit]
            # Room for one token more than the window: the last one is only predicted.
            pairs.append((tuple(head[-(limit + 1 - len(tail)) :]), tuple(tail)))
        documents.append(Document(tuple(pairs), example.gold, example.lengths, example.task, example.group))
    return documents
