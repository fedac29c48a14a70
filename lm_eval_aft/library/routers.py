"""Routers: which vector of a library a request gets. No learned parameters, no model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.library.entry import Entry
from lm_eval_aft.library.files import PART, is_name, suggestion

_MAX_TABLE = 2**18
_HINT = "See the shipped table: `aft vectors routes` prints it."
_NONE = ("", "none", "null", "~")


class Router(ABC):
    """Picks a vector for each request, by the task and the document's own question.

    The question (`question_of`) is all of the prompt that a router sees: the words of few-shot examples and
    instructions are the same for every document. To add a router, write a class here under
    ``@register_router``.

    Attributes:
        name: what a spec (``NAME`` or ``NAME:ARGUMENT``) calls it.
        usage: its specs, as ``--help`` lists them.
        by_request: whether requests with the same text may get different vectors.
    """

    name: ClassVar[str]
    usage: ClassVar[str]
    by_request: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def of(cls, argument: str, entries: Sequence[Entry]) -> Router:
        """The router with this argument (``""``: none given) over these vectors.

        Raises:
            AFTError: an argument that cannot be used, or a vector that is not there.
        """

    @abstractmethod
    def route(self, text: str, task: str | None = None) -> str | None:
        """The library name of the vector for a request, or ``None`` for no steering.

        Args:
            text: the document's own question, without few-shot examples and instructions.
            task: name of the harness task.
        """

    @abstractmethod
    def targets(self) -> list[str]:
        """The vectors that a request may get, each once."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Everything that decides where a request goes, as plain JSON values."""


ROUTERS: dict[str, type[Router]] = {}
R = TypeVar("R", bound=type[Router])


def register_router(cls: R) -> R:
    """Class decorator: make a router available under its name."""
    ROUTERS[cls.name] = cls
    return cls


@register_router
@dataclass(frozen=True)
class ConstantRouter(Router):
    """Every request gets the same vector."""

    name, usage, by_request = "constant", "constant:NAME", False
    vector: str | None

    @classmethod
    def of(cls, argument: str, entries: Sequence[Entry]) -> ConstantRouter:
        if not argument:
            raise AFTError("The router 'constant' needs a vector.", "Write constant:CATEGORY/NAME.")
        return cls(resolve(argument, entries))

    def route(self, text: str, task: str | None = None) -> str | None:
        return self.vector

    def targets(self) -> list[str]:
        return _each([self.vector])

    def described(self) -> dict[str, Any]:
        return {"constant": self.vector}


@register_router
@dataclass(frozen=True)
class TaskRouter(Router):
    """The vector depends on the harness task; a task that no pattern fits gets ``default``.

    Attributes:
        tasks: task name, or pattern with * and ?, -> library name; exact names come first, then
            patterns in order.
    """

    name, usage = "task", "task, task:TABLE.yaml"
    tasks: Mapping[str, str | None]
    default: str | None = None

    @classmethod
    def of(cls, argument: str, entries: Sequence[Entry]) -> TaskRouter:
        if not argument:
            return cls(task_table(entries))
        tasks, default = parse_task_table(read_table(Path(argument)))
        found = {name: resolve(name, entries) for name in _each([*tasks.values(), default])}
        return cls({task: found.get(name or "") for task, name in tasks.items()}, found.get(default or ""))

    def route(self, text: str, task: str | None = None) -> str | None:
        if task is None:
            return self.default
        if task in self.tasks:
            return self.tasks[task]
        return next((name for p, name in self.tasks.items() if fnmatchcase(task, p)), self.default)

    def targets(self) -> list[str]:
        return _each([*self.tasks.values(), self.default])

    def described(self) -> dict[str, Any]:
        return {"task": list(map(list, self.tasks.items())), "else": self.default}


@dataclass(frozen=True)
class Rule:
    """Words, any of which sends a request to ``vector``."""

    vector: str | None
    words: tuple[str, ...]
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        phrases = [r"\s+".join(map(re.escape, words.split())) for words in self.words]
        # \b would not do: a word may begin or end with a sign, as "+" does.
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE)
        object.__setattr__(self, "pattern", pattern)


@register_router
@dataclass(frozen=True)
class KeywordRouter(Router):
    """The first rule with a word that occurs in the request decides; otherwise ``default``."""

    name, usage = "keyword", "keyword, keyword:TABLE.yaml"
    rules: tuple[Rule, ...]
    default: str | None = None

    @classmethod
    def of(cls, argument: str, entries: Sequence[Entry]) -> KeywordRouter:
        table = parse_keyword_table(read_table(Path(argument)) if argument else default_table())
        if argument:
            chosen = {target: resolve(target, entries) for target in table.targets()}
        else:  # categories of the shipped table that the library lacks leave the model unsteered
            categories = {entry.category for entry in entries}
            chosen = {t: resolve(t, entries) for t in table.targets() if t in categories}
            if not chosen:
                raise AFTError(
                    "The library has none of the categories of the shipped table: "
                    f"{', '.join(table.targets())}.",
                    "Write a table of your own and give it as keyword:TABLE.yaml.",
                )
        rules = tuple(Rule(chosen.get(rule.vector or ""), rule.words) for rule in table.rules)
        return cls(rules, chosen.get(table.default or ""))

    def route(self, text: str, task: str | None = None) -> str | None:
        return next((rule.vector for rule in self.rules if rule.pattern.search(text)), self.default)

    def targets(self) -> list[str]:
        """The vectors, or categories, that the table names, each once."""
        return _each([*(rule.vector for rule in self.rules), self.default])

    def described(self) -> dict[str, Any]:
        return {"keyword": [[rule.vector, list(rule.words)] for rule in self.rules], "else": self.default}


def make_router(spec: str, entries: Sequence[Entry]) -> Router:
    """The router that ``spec`` means, over the vectors of a library.

    Args:
        spec: ``constant:NAME``; ``task`` (each vector serves the tasks it was trained on) or
            ``task:TABLE.yaml``; ``keyword`` (the shipped table) or ``keyword:TABLE.yaml``.
        entries: the library, as `Library.entries` gives it. Placebos and damaged vectors are passed over.

    Raises:
        AFTError: unknown router, a table that cannot be read, or one naming a vector that is not there.

    >>> router = make_router("task", [Entry("math/sums", tasks=("gsm8k",))])
    >>> router.route("What is 7 + 48?", task="gsm8k")
    'math/sums'
    """
    kind, _, argument = spec.partition(":")
    if kind not in ROUTERS:
        raise AFTError(f"There is no router {kind!r}.", f"Use one of: {', '.join(ROUTERS)}.")
    return ROUTERS[kind].of(argument, [each for each in entries if not each.error and not each.control])


def resolve(target: str, entries: Iterable[Entry]) -> str:
    """The vector that a table's entry means: a library name, or a category that holds just one.

    Raises:
        AFTError: no such vector, or a category with several.
    """
    known = [entry.name for entry in entries]
    if target in known:
        return target
    inside = [name for name in known if name.startswith(f"{target}/")]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise AFTError(
            f"The category {target!r} holds {len(inside)} vectors; a router needs one.",
            f"Name one of them: {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}",
        )
    hint = suggestion(target, known) or f"There are: {', '.join(known[:10]) or 'no vectors at all'}."
    raise AFTError(f"The library has no vector and no category {target!r}.", hint)


def task_table(entries: Sequence[Entry]) -> dict[str, str | None]:
    """Each task -> the vector that was trained on it alone.

    Raises:
        AFTError: two vectors for one task, or none for any.
    """
    table: dict[str, str | None] = {}
    for entry in entries:
        # Composed, trained on several tasks or made by hand: it belongs to no one task.
        if len(entry.tasks) != 1 or entry.recipe is not None:
            continue
        task = entry.tasks[0]
        if task in table:
            raise AFTError(
                f"Both {table[task]} and {entry.name} were trained on {task!r}; the router 'task' needs one.",
                "Write a table with `tasks: {TASK: CATEGORY/NAME}` and give it as task:TABLE.yaml.",
            )
        table[task] = entry.name
    if not table:
        raise AFTError("No vector of the library names the task it was trained on.", "Use another router.")
    return table


def default_table() -> str:
    """The text of the keyword table that comes with the package."""
    return Path(__file__).with_name("keywords.yaml").read_text(encoding="utf-8")


def read_table(path: Path) -> str:
    """The text of a table's file; raises `AFTError` if it cannot be read or is far too long."""
    try:
        if path.stat().st_size > 4 * _MAX_TABLE:
            raise AFTError(f"The table {path} is too long.")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise AFTError(f"The table {path} cannot be read: {reason}.", _HINT) from error


def parse_keyword_table(text: str) -> KeywordRouter:
    """Read a keyword table: ``rules`` (each ``vector`` and ``words``) and ``else``.

    Raises:
        AFTError: not YAML, or not such a table; the message names the place.
    """
    table = _mapping(text, "keyword table", ("rules", "else"))
    rules = table.get("rules")
    if not isinstance(rules, list) or not rules:
        raise AFTError("A keyword table needs `rules`, a list of at least one.", _HINT)
    parsed = []
    for number, rule in enumerate(rules, 1):
        where = f"Rule {number} of the keyword table"
        if not isinstance(rule, dict) or rule.keys() != {"vector", "words"}:
            raise AFTError(f"{where} needs `vector` and `words`, and nothing else.", _HINT)
        words = rule["words"]
        if not isinstance(words, list) or not words:
            raise AFTError(f"{where}: `words` must be a list of at least one word.", _HINT)
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise AFTError(f"{where}: every word must be text.", "Put quotes around signs: ['+', '%'].")
        parsed.append(Rule(_target(rule["vector"], where), tuple(words)))
    return KeywordRouter(tuple(parsed), _target(table.get("else", "none"), "`else` of the keyword table"))


def parse_task_table(text: str) -> tuple[dict[str, str | None], str | None]:
    """Read a task table: ``tasks`` (task name or pattern -> vector) and ``else``.

    Raises:
        AFTError: not YAML, or not such a table; the message names the place.
    """
    table = _mapping(text, "task table", ("tasks", "else"))
    tasks = table.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise AFTError("A task table needs `tasks`, which maps task names to vectors.", "")
    if not all(isinstance(task, str) and task for task in tasks):
        raise AFTError("A task table's `tasks` must have task names as keys.", "")
    named = {task: _target(name, f"Task {task[:80]!r} of the task table") for task, name in tasks.items()}
    return named, _target(table.get("else", "none"), "`else` of the task table")


def _each(names: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _mapping(text: str, what: str, keys: tuple[str, ...]) -> dict[Any, Any]:
    if len(text) > _MAX_TABLE:
        raise AFTError(f"The {what} is longer than {_MAX_TABLE:,} characters.")
    import yaml  # here, so that listing the routers for --help does not wait for it

    from lm_eval_aft._util.settings import read_yaml

    try:
        table = read_yaml(text, texts=True)
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0][:200]
        raise AFTError(f"The {what} is not YAML: {reason or type(error).__name__}.", _HINT) from error
    if not isinstance(table, dict):
        raise AFTError(f"The {what} must be a mapping with {' and '.join(f'`{k}`' for k in keys)}.", _HINT)
    unknown = [str(key)[:80] for key in table if key not in keys]
    if unknown:
        raise AFTError(f"The {what} has unknown keys: {', '.join(unknown[:5])}.", _HINT)
    return table


def _target(value: Any, where: str) -> str | None:
    if isinstance(value, str) and value.strip().lower() in _NONE:
        return None
    if not isinstance(value, str) or not (is_name(value) or re.fullmatch(PART, value)):
        raise AFTError(
            f"{where} names {str(value)[:80]!r}, which is no vector's name.",
            "Write CATEGORY/NAME, a category that holds one vector, or none.",
        )
    return value


# The question in a prompt: its last part, without the examples, instructions and passages before it.

# Shorter texts (labels, numbers, names) could stand anywhere in a prompt.
_SHORTEST = 8
# Texts of this length hardly occur in another document's example by chance.
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
