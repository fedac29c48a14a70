"""Reading YAML that people write by hand, or get from others, without its surprises."""

from __future__ import annotations

from typing import Any

import yaml

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
