"""Reading settings that people write: YAML without surprises, and fields of the kind they should be."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from lm_eval_aft._util.errors import AFTError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+=%,-]{0,95}")
HINT = "scripts/studies/local.yaml shows every field."


class Fields:
    """Takes values out of a decoded YAML file and gathers what is wrong with them.

    Each reader returns something usable even for a bad value, so that reading goes on to the next fault.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self.faults: list[str] = []

    def fault(self, where: str, what: str) -> None:
        """Note that the field ``where`` is wrong."""
        self.faults.append(f"{where}: {what}")

    def check(self) -> None:
        """Raise `AFTError` if anything was wrong."""
        if len(self.faults) == 1:
            raise AFTError(f"The study {self.source} cannot be used: {self.faults[0]}", HINT)
        if self.faults:
            told = "".join(f"\n  {fault}" for fault in self.faults)
            raise AFTError(f"The study {self.source} has {len(self.faults)} faults:{told}", HINT)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Note an error of the block as a fault of this field."""
        try:
            yield
        except AFTError as error:
            self.fault(where, f"{error.what} {error.hint}".strip())
        except (TypeError, ValueError, AttributeError) as error:
            self.fault(where, f"a setting makes no sense ({error}).")

    def expanded(self, value: Any, where: str) -> Any:
        """The value with every ``${VARIABLE}`` in its texts replaced from the environment."""
        if isinstance(value, dict):
            return {key: self.expanded(each, f"{where}.{key}".strip(".")) for key, each in value.items()}
        if isinstance(value, list):
            return [self.expanded(each, f"{where}[{i}]") for i, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        for name in _VARIABLE.findall(value):
            if name not in os.environ:
                self.fault(where, f"the environment has no variable {name}.")
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], ""), value)

    def mapping(self, value: Any, where: str, known: Collection[str] = (), head: str = "") -> dict[str, Any]:
        """A mapping, of ``known`` keys where any are given; with ``head``, text means ``{head: text}``."""
        if head and isinstance(value, str):
            return {head: value}
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fault(where, f"wants a mapping, got {value!r}.")
            return {}
        for key in value if known else ():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
                self.fault(f"{where}.{key}".strip("."), f"there is no such field; {meant}")
        return {str(key): each for key, each in value.items()}

    def items(self, value: Any, where: str) -> list[Any]:
        """A list that is not empty."""
        if not isinstance(value, list) or not value:
            self.fault(where, "wants a list of at least one." if value in (None, []) else "wants a list.")
            return []
        return value

    def text(self, value: Any, where: str, default: str = "") -> str:
        """Text that is not empty."""
        if value is None and default:
            return default
        if not isinstance(value, str) or not value.strip():
            self.fault(where, f"wants a text, got {value!r}." if value is not None else "is missing.")
            return default or "?"
        return value

    def name(self, value: Any, where: str) -> str:
        """Text that can be a part of a cell's name."""
        name = self.text(value, where)
        if name != "?" and not _NAME.fullmatch(name):
            self.fault(where, f"{name!r} cannot be a name: letters, digits and _ - . only; give a name:.")
        return name

    def count(self, value: Any, where: str, least: int = 1) -> int | None:
        """A whole number, or ``None``."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fault(where, f"wants a whole number of at least {least}, got {value!r}.")
            return None
        return value

    def flag(self, value: Any, where: str) -> bool:
        """Yes or no."""
        if value is None:
            return False
        if not isinstance(value, bool):
            self.fault(where, f"wants true or false, got {value!r}.")
        return bool(value)

    def distinct(self, names: list[str], where: str) -> None:
        """Note names that occur twice."""
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self.fault(where, f"{name!r} occurs twice; give each its own name:.")


_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
}


def check_field_types(instance: Any) -> None:
    """Check the fields that are annotated as int, float, str or bool, perhaps or None; others pass.

    Raises:
        AFTError: a value of another kind; its name and the value are told.
    """
    for field in fields(instance):
        name, _, rest = str(field.type).partition(" | ")
        if name not in _KINDS or rest not in ("", "None"):
            continue
        value, (kind, wanted) = getattr(instance, field.name), _KINDS[name]
        if value is None and rest:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise AFTError(f"{field.name}={str(value)[:80]!r} makes no sense.", f"It should be {wanted}.")


# Reading YAML that people write by hand, or get from others, without its surprises.

MOST = 100_000  # values in a file, aliases written out


def read_yaml(text: str, *, texts: bool = False) -> Any:
    """What a YAML text says; nothing in it is run.

    Args:
        texts: leave every scalar as the text it is, so that ``no`` and ``on`` stay words.

    Raises:
        yaml.YAMLError: not YAML, nested too deeply, a key that a mapping has twice (YAML itself would
            silently keep the last), or aliases for too much; the message's first line says which.
    """
    try:
        if texts:
            _check(yaml.compose(text, Loader=yaml.BaseLoader))
            return yaml.load(text, Loader=yaml.BaseLoader)
        _check(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise yaml.YAMLError(reason or type(error).__name__) from error


def _check(root: yaml.Node | None) -> None:
    """Refuse keys twice in a mapping, and aliases that stand for too much.

    A few lines of aliases, each naming the one before twice, are more than any memory holds.
    """
    sizes: dict[int, int] = {}  # by node: composing makes an alias the very node it stands for
    if root is not None and _size(root, sizes) > MOST:
        raise yaml.YAMLError(f"written out, its aliases come to more than {MOST:,} values")


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError("an alias stands for what it is part of")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice([key for key, _ in node.value])
        parts = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    sizes[id(node)] = 1 + sum(_size(each, sizes) for each in parts)
    return sizes[id(node)]


def _refuse_twice(keys: list[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        if isinstance(key, yaml.ScalarNode):  # any other is refused where the mapping is made
            if (key.tag, key.value) in seen:
                raise yaml.YAMLError(f"{str(key.value)[:80]!r} occurs twice in a mapping")
            seen.add((key.tag, key.value))
