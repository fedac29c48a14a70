"""Shapes of published models and lengths of well-known tasks' documents, for plans made offline.

The numbers are in ``known_models.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.settings import read_yaml
from lm_eval_aft.engine.batching import Document

Lengths = tuple[int, tuple[int, ...]]  # tokens of the context, tokens of each continuation


@dataclass(frozen=True)
class TaskSize:
    """How many documents a task has, and how long they are.

    Attributes:
        train, evaluation: documents in those splits.
        example: tokens that each few-shot example adds, on average.
        lengths: of typical documents, the longest last.
    """

    train: int
    evaluation: int
    example: int
    lengths: tuple[Lengths, ...]

    def documents(self, num_fewshot: int = 0, share: int = 1) -> list[Document]:
        """Typical documents without contents; the longest comes last.

        Args:
            share: how many of each length show the same examples, where they show any.
        """
        examples = num_fewshot * self.example
        if not examples or share == 1:
            return documents_of([(examples + context, tails) for context, tails in self.lengths])
        found = []
        for group, (context, tails) in enumerate(self.lengths):
            for member in range(share):
                prompt = (0,) * examples + (1 + member,) * context
                pairs = tuple((prompt, (0,) * tail) for tail in tails)
                found.append(Document(pairs, (0,), tuple(map(float, tails)), group=group))
        return found


def _task_size(given: dict[str, Any]) -> TaskSize:
    return TaskSize(
        **given | {"lengths": tuple((context, tuple(tails)) for context, tails in given["lengths"])}
    )


_DATA = read_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
# Hub id -> model type, and the settings of its config that are not the default.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    model: (settings.pop("model_type"), settings) for model, settings in _DATA["models"].items()
}
TASK_SIZES = {task: _task_size(given) for task, given in _DATA["tasks"].items()}
OTHER_TASKS = _task_size(_DATA["other_tasks"])  # assumed for any task that is not listed


def find_config(model: str) -> Any:
    """The transformers config of a Hub model or local folder; known shapes need no network.

    Raises:
        AFTError: neither known nor to be had.
    """
    from transformers import AutoConfig

    from lm_eval_aft.demo import resolve_pretrained

    if model in KNOWN:
        family, settings = KNOWN[model]
        return AutoConfig.for_model(family, **settings)
    try:
        return AutoConfig.from_pretrained(resolve_pretrained(model))
    except (OSError, ValueError) as error:
        raise AFTError(
            f"The config of {model!r} cannot be had: {str(error).strip().splitlines()[0]}",
            f"Give a local folder, go online, or use one of: {', '.join(KNOWN)}.",
        ) from error


def typical_documents(task: str, num_fewshot: int = 0, share: int = 1) -> list[Document]:
    """Documents as long as a well-known task's, see `TaskSize.documents`.

    >>> context, answer = typical_documents("gsm8k", num_fewshot=5)[0].pairs[0]
    >>> len(context), len(answer)
    (1224, 81)

    Raises:
        AFTError: the task's lengths are not known here.
    """
    if task not in TASK_SIZES:
        raise AFTError(
            f"The lengths of the documents of {task!r} are not known.",
            f"Known: {', '.join(TASK_SIZES)}. Use documents_of with lengths of your own.",
        )
    return TASK_SIZES[task].documents(num_fewshot, share)


def documents_of(lengths: Sequence[Lengths]) -> list[Document]:
    """Documents of these lengths in tokens, without contents."""
    return [
        Document(tuple(((0,) * context, (0,) * tail) for tail in tails), (0,), tuple(map(float, tails)))
        for context, tails in lengths
    ]
