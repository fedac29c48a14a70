"""lm-eval's output types: what training makes of their documents, and whether questions can be removed.

To add one, write a class here under ``@register_output_type``; `aft tasks --trainable`, training and
``answer_only`` read the table `OUTPUT_TYPES`. Importing this module does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

Document = dict[str, Any]


class Options(NamedTuple):
    """What a document is trained on; see `lm_eval_aft.harness.examples.Example`.

    ``sizes`` are the options' lengths in bytes, as acc_bytes counts them, where they are options.
    """

    requests: tuple[tuple[str, str], ...]
    gold: tuple[int, ...]
    lengths: tuple[float, ...]
    sizes: tuple[float, ...] = ()


class OutputType(ABC):
    """What requests of one type mean.

    Attributes:
        name: as ``output_type`` names it in a task's YAML.
        objective: what its tasks are trained with, unless another is asked for.
        generates: whether answers are generated, so that they can be sampled.
        not_alone: why it cannot be scored without its questions, or ``""``.
    """

    name: ClassVar[str]
    objective: ClassVar[str]
    generates: ClassVar[bool] = False
    not_alone: ClassVar[str] = ""

    def trainable(self, metrics: set[str]) -> bool:
        """Whether tasks that report these metrics can be trained on."""
        return True

    @abstractmethod
    def options(
        self, task: ConfigurableTask, doc: Document, requests: Sequence[Any], delimiter: str
    ) -> Options | None:
        """What to train on, or ``None`` where the document has no usable gold answer.

        Args:
            requests: the arguments of the harness's own requests for it.
            delimiter: what stands between a prompt and its answer.
        """

    @abstractmethod
    def key(self, task: ConfigurableTask, doc: Document, text: Any, choices_field: Any) -> list[str]:
        """Texts that duplicates of a document share.

        Args:
            text: its question (or an option's index, where the options are in the contexts).
            choices_field: the field that its options are read from, if not the usual one.
        """


OUTPUT_TYPES: dict[str, OutputType] = {}
T = TypeVar("T", bound=OutputType)


def register_output_type(cls: type[T]) -> type[T]:
    """Class decorator: make an output type known under its name."""
    OUTPUT_TYPES[cls.name] = cls()
    return cls


def gold_options(task: ConfigurableTask, doc: Document, choices: Sequence[str]) -> tuple[int, ...]:
    """Indices of the right options."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    indices = gold if isinstance(gold, list) else [gold]
    # numpy's integers too, which the harness takes as well.
    return tuple(int(i) for i in indices if isinstance(i, Integral) and 0 <= int(i) < len(choices))


def gold_text(task: ConfigurableTask, doc: Document) -> str:
    """The gold answer as text; the first of several."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, list):
        target = target[0] if target else ""
    return str(target)


@register_output_type
class MultipleChoice(OutputType):
    """Options of which some are right."""

    name = "multiple_choice"
    objective = "choice"

    def trainable(self, metrics: set[str]) -> bool:
        """Options scored by exact match are accepted answers, all of them right."""
        return metrics != {"exact_match"}

    def options(
        self, task: ConfigurableTask, doc: Document, requests: Sequence[Any], delimiter: str
    ) -> Options | None:
        choices = task.doc_to_choice(doc)
        # Tasks that score mutual information append requests without context, which are no options.
        pairs = tuple((str(context), str(tail)) for context, tail, *_ in requests[: len(choices)])
        gold = gold_options(task, doc, choices)
        if not gold or len(set(gold)) == len(pairs):
            return None  # nothing to choose
        lengths = tuple(float(max(1, len(choice))) for choice in choices)
        return Options(pairs, gold, lengths, tuple(float(max(1, len(choice.encode()))) for choice in choices))

    def key(self, task: ConfigurableTask, doc: Document, text: Any, choices_field: Any) -> list[str]:
        choices = task.doc_to_choice(doc, choices_field)
        right = sorted(choices[i] for i in gold_options(task, doc, choices))
        return [*(sorted(choices) if isinstance(text, int) else [str(text)]), *right]


@register_output_type
class GenerateUntil(OutputType):
    """Answers that the model writes."""

    name = "generate_until"
    objective = "lm"
    generates = True
    not_alone = "its answers are generated"

    def options(
        self, task: ConfigurableTask, doc: Document, requests: Sequence[Any], delimiter: str
    ) -> Options | None:
        target = gold_text(task, doc)
        if not target.strip():
            return None
        return Options(((requests[0][0], delimiter + target),), (0,), (float(len(target)),))

    def key(self, task: ConfigurableTask, doc: Document, text: Any, choices_field: Any) -> list[str]:
        return [str(text)] if str(text).strip() else [str(text), gold_text(task, doc)]


@register_output_type
class Loglikelihood(GenerateUntil):
    """One continuation, which is the gold answer."""

    name = "loglikelihood"
    generates = False
    not_alone = ""

    def options(
        self, task: ConfigurableTask, doc: Document, requests: Sequence[Any], delimiter: str
    ) -> Options | None:
        found = super().options(task, doc, requests, delimiter)
        return found and Options(((requests[0][0], requests[0][1]),), found.gold, found.lengths)
