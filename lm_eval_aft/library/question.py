"""What a prompt asks: its last part, without the examples, instructions and passages before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Shorter texts (labels, numbers, names) could stand anywhere in a prompt.
_SHORTEST = 8
# Texts from here on hardly stand in another document's example by chance.
_TELLING = 24


def question_of(prompt: str, document: Any = None) -> str:
    """The part of a harness prompt that asks the document's own question.

    Texts of the document that the prompt shows word for word mark the place: the question goes from
    the line where the first of them begins, as the template wrote it, to the prompt's end. Where none
    is shown, it is the last paragraph.

    Args:
        prompt: the context that the model is given, few-shot examples and all.
        document: the task's document; its texts may lie at any depth.
    """
    # The last occurrences: an example may hold the same words.
    places = [
        (prompt.rindex(text), len(text))
        for text in _texts(document)
        if len(text) >= _SHORTEST and text in prompt
    ]
    if not places:
        return prompt.rstrip().rpartition("\n\n")[2]
    longest, _ = max(places, key=lambda place: (place[1], -place[0]))
    start = min([longest, *(place for place, length in places if length >= _TELLING)])
    for place, _ in sorted(places, reverse=True):
        if place < start and "\n\n" not in prompt[place:start]:
            start = place
    return prompt[prompt.rfind("\n", 0, start) + 1 :]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
