"""Settings classes that check their values, and YAML that people write by hand, without its surprises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import field
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

from lm_eval_aft._util.errors import AFTError

T = TypeVar("T")


def _checked(value: Any, check: Callable[[Any], Any]) -> Any:
    # As it was given: 1 would become 1.0, and digests of settings would change.
    check(value)
    return value


_AsGiven = WrapValidator(_checked)
Number = Annotated[float, Field(allow_inf_nan=False), _AsGiven]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _AsGiven]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _AsGiven]
Share = Annotated[float, Field(gt=0, le=1), _AsGiven]
Count = Annotated[int, Field(ge=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that checks the types and limits of its fields.

    Nothing is converted. Making an instance raises `AFTError` for a value that does not fit.

    >>> @settings
    ... class Speed:
    ...     metres_per_second: Positive
    >>> Speed(-1.0)
    Traceback (most recent call last):
    lm_eval_aft._util.errors.AFTError: metres_per_second=-1.0 is invalid.
    metres_per_second should be greater than 0.
    """
    made: Any = dataclass(cls, frozen=True, config=ConfigDict(strict=True, extra="forbid"))
    check = made.__init__

    @wraps(check)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise _plain(error, list(made.__dataclass_fields__)) from error

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def _plain(error: ValidationError, names: list[str]) -> AFTError:
    whats: dict[Any, str] = {}
    hints: dict[Any, str] = {}
    for fault in error.errors(include_url=False):
        place = fault["loc"][0]
        name = names[place] if isinstance(place, int) else place
        whats.setdefault(name, f"{name}={str(fault['input'])[:80]} is invalid.")
        reason = f"{name} {fault['msg'][0].lower()}{fault['msg'][1:]}."
        hints.setdefault(name, reason.replace("input should", "should"))
    return AFTError(" ".join(whats.values()), " ".join(hints.values()))


# YAML.

MOST = 100_000  # values in a file, aliases written out


def read_yaml(text: str, *, texts: bool = False) -> Any:
    """What a YAML text says; nothing in it is run.

    >>> read_yaml("a: no"), read_yaml("a: no", texts=True)
    ({'a': False}, {'a': 'no'})

    Args:
        texts: leave every scalar as the text it is, so that ``no`` and ``on`` stay words.

    Raises:
        yaml.YAMLError: not YAML, nested too deeply, a key that a mapping has twice (YAML itself would
            silently keep the last), or aliases for too much; the message's first line says which.
    """
    try:
        loader: Any = (yaml.BaseLoader if texts else yaml.SafeLoader)(text)
        root = loader.get_single_node()
        if root is None:
            return None
        # A few lines of aliases, each naming the one before twice, are more than any memory holds.
        if _size(root, {}) > MOST:
            raise yaml.YAMLError(f"written out, its aliases come to more than {MOST:,} values")
        return loader.construct_document(root)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise yaml.YAMLError(reason or type(error).__name__) from error


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for; an alias was composed into the very node that it names."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError("an alias stands for what it is part of")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = Counter((k.tag, k.value) for k, _ in node.value if isinstance(k, yaml.ScalarNode))
        if twice := [value for (_, value), count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"{str(twice[0])[:80]!r} occurs twice in a mapping")
        parts = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    sizes[id(node)] = 1 + sum(_size(each, sizes) for each in parts)
    return sizes[id(node)]
