"""What mkdocs.yml cannot say: formulas, the help of every command, and the examples in docstrings.

Formulas are set when the site is built, so that pages need no script for them. (GitHub shows the same
```` ```math ```` blocks by itself.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
import griffe
from latex2mathml.converter import convert

from lm_eval_aft.cli.main import aft

COMMANDS = "<!-- the help of every command -->"


def on_config(config: Any) -> Any:
    """Let superfences set ``math`` blocks; mkdocs calls this once it has read its settings."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _formula})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of every command where a page asks for it."""
    if COMMANDS not in markdown:
        return markdown
    return markdown.replace(COMMANDS, "\n".join(_help(aft, _context(aft, "aft"))))


def _formula(source: str, *_: object, **__: object) -> str:
    return f"<p>{convert(source, display='block')}</p>"


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, parent=parent, info_name=name, **command.context_settings)


def _help(command: click.Command, context: click.Context) -> Iterator[str]:
    """A heading and the help text of a command, then of those below it."""
    yield f"{'#' * min(3, context.command_path.count(' ') + 2)} {context.command_path}\n"
    context.terminal_width = 78
    # One that takes all its arguments for another program has no --help.
    yield f"```text\n{command.get_help(context)}\n```\n"
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from _help(each, _context(each, name, context))


class DoctestFences(griffe.Extension):
    """Shows the ``>>>`` examples of docstrings as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """griffe calls this for everything it has read."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^>>> .*(?:\n.+)*",
                lambda found: f"```pycon\n{found[0]}\n```",
                obj.docstring.value,
                flags=re.M,
            ).replace("  # doctest: +SKIP", "")
