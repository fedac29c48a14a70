"""Training examples: documents of a harness task, with prompts built by lm-eval's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.private_names import borrowed
from lm_eval_aft._util.settings import settings
from lm_eval_aft.engine.batching import TokenizedDocument
from lm_eval_aft.harness.commands import lm_eval_flags
from lm_eval_aft.harness.output_types import OUTPUT_TYPES
from lm_eval_aft.harness.tasks import NOT_TEXT, refuse_thinking, set_num_fewshot

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM


@settings
class PromptSettings:
    """How prompts are built, as lm-eval's flags of these names say.

    ``fewshot_as_multiturn`` of ``None`` follows lm-eval: on with a chat template, else off.
    """

    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None

    def flags(self) -> list[str]:
        """The same prompts as flags of ``lm_eval run``.

        >>> PromptSettings(num_fewshot=5, apply_chat_template=True).flags()
        ['--num_fewshot', '5', '--apply_chat_template']
        """
        return lm_eval_flags(asdict(self))


PROMPTS = tuple(each.name for each in fields(PromptSettings))


@dataclass(frozen=True)
class Example:
    """One prompted document.

    Attributes:
        doc_id: index of the document in its split.
        requests: (context, continuation) strings, exactly as the harness would send them; one
            per option, or the gold continuation alone for generation.
        gold: indices of the right requests.
        lengths: option lengths in characters, as acc_norm counts them, or in bytes for acc_bytes.
        task: the number of its task, where several are trained on.
        group: the same number for all examples whose prompts show the same few-shot examples.
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
    """Turns documents of one task into `Example`s through the task's own methods.

    Attributes:
        in_bytes: whether an example's option lengths are in bytes, not characters.
        fault: why lm-eval could not build the first document's prompt for which it could not.
    """

    def __init__(self, task: ConfigurableTask, lm: HFLM, prompts: PromptSettings) -> None:
        from lm_eval.api.task import ConfigurableTask

        if not isinstance(task, ConfigurableTask):
            raise AFTError(
                f"Task {task.task_name!r} is written in Python without a config.",
                "Only YAML-style tasks can be trained on.",
            )
        if task.OUTPUT_TYPE not in OUTPUT_TYPES:
            raise AFTError(
                f"Task {task.config.task!r} is of type {task.OUTPUT_TYPE!r}, which cannot be trained on.",
                f"Trainable types: {', '.join(OUTPUT_TYPES)}.",
            )
        if any(getattr(task.config, f"doc_to_{kind}", None) for kind in NOT_TEXT):
            raise AFTError(
                f"The prompts of task {task.config.task!r} hold images or sounds.",
                "Vectors are trained on text: choose a task with text only.",
            )
        self.output_type = OUTPUT_TYPES[task.OUTPUT_TYPE]
        if not self.output_type.generates:
            refuse_thinking(lm, [task.config.task])
        self.task, self.lm, self.prompts = task, lm, prompts
        self.in_bytes = False
        self.fault: AFTError | None = None
        self.num_fewshot = set_num_fewshot(task, prompts.num_fewshot)
        self.objective = self.output_type.objective
        self._chat_template = lm.apply_chat_template if prompts.apply_chat_template else None
        multiturn = prompts.fewshot_as_multiturn
        self._multiturn = prompts.apply_chat_template if multiturn is None else multiturn

    def requests(self, doc: dict[str, Any]) -> list[tuple[Any, ...]]:
        """The arguments of the harness's own requests for this document.

        Raises:
            AFTError: the task's own templates or functions fail on it.
        """
        with self._own_faults():
            return self._requests(doc)

    @contextmanager
    def _own_faults(self) -> Iterator[None]:
        try:
            yield
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
            system_instruction=self.prompts.system_instruction,
            apply_chat_template=self.prompts.apply_chat_template,
            fewshot_as_multiturn=self._multiturn,
            chat_template=self._chat_template,
            gen_prefix=self.task.doc_to_prefix(doc),
        )
        built = self.task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(self.task.config["task"], 0, 1),
            apply_chat_template=self.prompts.apply_chat_template,
            chat_template=self._chat_template,
        )
        return [instance.args for instance in (built if isinstance(built, list) else [built])]

    def example(self, doc: dict[str, Any], doc_id: int) -> Example | None:
        """The example for a document.

        ``None`` where it has no usable gold answer, where lm-eval cannot build its prompt (the first
        reason is kept in `fault`), or could not score it, since nothing is left of a blank text.
        """
        try:
            with self._own_faults():
                options = self.output_type.options(self.task, doc, self._requests(doc), self._delimiter(doc))
        except AFTError as error:
            self.fault = self.fault or error
            return None
        if options is None or not all(map(self._has_tokens, options.requests)):
            return None
        lengths = (self.in_bytes and options.sizes) or options.lengths
        return Example(doc_id, options.requests, options.gold, lengths, doc=doc)

    def _has_tokens(self, request: tuple[str, str]) -> bool:
        """Whether blank texts leave a token before the continuation, and one of it."""
        return all(text.strip() for text in request) or all(token_pair(self.lm, *request))

    def key(self, doc: dict[str, Any], fewshot: bool = False) -> str:
        """A hash that duplicates share: of the question, and with options of the gold answer too.

        Case and white space are ignored. With ``fewshot`` the document is read through the
        task's few-shot fields, where it has any.
        """
        config = self.task.fewshot_cfg if fewshot else None
        try:
            text = self.task.doc_to_text(doc, config.doc_to_text if config else None)
            parts = self.output_type.key(self.task, doc, text, config.doc_to_choice if config else None)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, TemplateError):
            parts = [json.dumps(doc, sort_keys=True, default=str)]
        normal = "\x1f".join(" ".join(part.casefold().split()) for part in parts)
        return hashlib.sha256(normal.encode()).hexdigest()

    def _delimiter(self, doc: dict[str, Any]) -> str:
        # As the harness joins a few-shot answer to its question; a chat turn starts without a delimiter.
        prefix = self.task.doc_to_prefix(doc)
        if prefix:
            return "" if str(prefix)[-1:].isspace() else " "
        return "" if self.prompts.apply_chat_template else str(self.task.config.target_delimiter)


def token_pair(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, split exactly as ``hf`` would."""
    if context == "":
        tail, prefix = lm.tok_encode(continuation, add_special_tokens=False), lm.prefix_token_id
        return (tail[:1], tail[1:]) if tail[:1] == [prefix] else ([prefix], tail)
    with borrowed("lm-eval: HFLM._encode_pair"):
        split = lm._encode_pair
    head, tail = split(context, continuation)
    return head, tail


def encode(examples: Iterable[Example], lm: HFLM) -> list[TokenizedDocument]:
    """Token ids of examples, split and cut on the left exactly as ``hf`` would."""
    documents = []
    limit = lm.max_length
    for example in examples:
        pairs = []
        for context, continuation in example.requests:
            head, tail = token_pair(lm, context, continuation)
            if not tail:
                raise AFTError(
                    f"The tokenizer makes nothing of {continuation!r} (document {example.doc_id}).",
                    "Check that it is the model's own, or give another: --model-args tokenizer=...",
                )
            tail = tail[:limit]
            # Room for one token more than the window: the last one is only predicted.
            pairs.append((tuple(head[-(limit + 1 - len(tail)) :]), tuple(tail)))
        documents.append(
            TokenizedDocument(tuple(pairs), example.gold, example.lengths, example.task, example.group)
        )
    return documents
