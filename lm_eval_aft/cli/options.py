"""What several commands share: model arguments, printed tables, how an interrupted one ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lm_eval_aft.errors import AFTError
from lm_eval_aft.termination import EXIT_CODE, Terminated


def parse_model_args(text: str | None, **overrides: Any) -> dict[str, Any]:
    """``key=value,key=value`` as lm-eval reads it, plus the options that were given.

    Raises:
        AFTError: not of that form.
    """
    if not text:
        found: dict[str, Any] = {}
    else:
        from lm_eval.utils import simple_parse_args_string

        if not all("=" in part for part in text.split(",")):
            raise AFTError(f"Cannot read model arguments {text!r}.", "Write key=value,key=value.")
        found = dict(simple_parse_args_string(text))
    return found | {key: value for key, value in overrides.items() if value is not None}


def ended(end: BaseException, output: Path | None = None) -> NoReturn:
    """Tell that Ctrl-C or SIGTERM ended a command that can be resumed; exit with 130 or 143."""
    terminated = isinstance(end, Terminated)
    word, where = "Terminated" if terminated else "Interrupted", f" --output {output}" if output else ""
    print(f"\n{word}. What is finished is kept: go on with --resume{where}.", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_CODE if terminated else 130) from None


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], mark: int = -1) -> None:
    """Print a table; the row numbered ``mark`` is set in bold."""
    table = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for i, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if i == mark else None)
    # Without a terminal rich assumes 80 columns and cuts cells; logs have room.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
