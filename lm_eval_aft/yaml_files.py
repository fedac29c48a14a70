"""Reading YAML that people write by hand, or get from others, without its surprises."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import BaseConstructor


def _compose_node(loader: Any, parent: Any, index: Any) -> Any:
    if loader.check_event(yaml.AliasEvent):
        # A few lines of them, each naming the one before twice, stand for more than any memory holds.
        raise yaml.YAMLError(f"it uses an alias (*{loader.peek_event().anchor[:40]}): write it out")
    return Composer.compose_node(loader, parent, index)


def _refuse_twice(loader: Any, node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        found = loader.construct_object(key, deep=True)
        if isinstance(found, Hashable):  # any other is refused where the mapping is made
            if found in seen:
                raise yaml.YAMLError(f"{str(found)[:80]!r} occurs twice in a mapping")
            seen.add(found)


class _Values(yaml.SafeLoader):
    compose_node = _compose_node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(self, node)
        return dict(super().construct_mapping(node, deep))


class _Texts(yaml.BaseLoader):
    compose_node = _compose_node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(self, node)
        return dict(BaseConstructor.construct_mapping(self, node, deep))


def read_yaml(text: str, *, texts: bool = False) -> Any:
    """What a YAML text says; nothing in it is run.

    Args:
        texts: leave every scalar as the text it is, so that ``no`` and ``on`` stay words.

    Raises:
        yaml.YAMLError: not YAML, nested too deeply, a key that a mapping has twice (YAML itself would
            silently keep the last), or an alias; the message's first line says which.
    """
    try:
        return yaml.load(text, _Texts if texts else _Values)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise yaml.YAMLError(reason or type(error).__name__) from error
