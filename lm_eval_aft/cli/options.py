"""What commands share: model arguments, ``--offline``, printed tables, and errors without tracebacks."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import EXIT_CODE, Terminated
from lm_eval_aft._util.tracking import TRACKERS


def parse_pairs(text: str, what: str = "model arguments") -> dict[str, Any]:
    """``key=value,key=value`` as lm-eval reads it, or a JSON object.

    >>> parse_pairs("size=4096,kinds=a b"), parse_pairs('{"sizes": [4096, 8192]}')
    ({'size': 4096, 'kinds': 'a b'}, {'sizes': [4096, 8192]})

    Raises:
        AFTError: not of that form, or a key that occurs twice.
    """
    from lm_eval.utils import simple_parse_args_string

    try:
        if text.startswith("{"):
            return dict(json.loads(text))
        parts = [part.partition("=") for part in text.strip().split(",")]
        if not all(key.strip() and sign for key, sign, _ in parts):
            raise ValueError("a part of it has no name or no =")
        if twice := [key for key, count in Counter(key for key, *_ in parts).items() if count > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return dict(simple_parse_args_string(text))
    except (ValueError, RecursionError) as error:
        raise AFTError(
            f"Cannot read {what} {text[:200]!r}: {error}.", "Write key=value,key=value, or a JSON object."
        ) from error


def parse_model_args(text: str | None, **overrides: Any) -> dict[str, Any]:
    """Model arguments as `parse_pairs` reads them, plus the options that were given.

    >>> parse_model_args("revision=main,trust_remote_code=true", device="cpu", dtype=None)
    {'revision': 'main', 'trust_remote_code': True, 'device': 'cpu'}

    Raises:
        AFTError: not of that form, a value of the wrong type, or a misspelt name; see `read_model_args`.
    """
    from lm_eval_aft.harness.model_args import TEXTS, read_model_args

    found = parse_pairs(text) if text else {}
    if "pretrained" in found:
        raise AFTError(
            "The model arguments name a model (pretrained=), which --model does.", "Leave one of them out."
        )
    if text and not text.startswith("{"):
        # lm-eval makes a number of a name like 007: of our arguments those that are none stay texts.
        for key, _, written in (part.partition("=") for part in text.strip().split(",")):
            if key in TEXTS and isinstance(found[key], int | float) and type(found[key]) is not bool:
                found[key] = written.strip()
    return read_model_args(found | {key: value for key, value in overrides.items() if value is not None})


class LateHelp(click.Option):
    """An option that makes its help when asked for it, so that starting a command imports nothing for it."""

    def __init__(self, *names: Any, late_help: Callable[[], str], **settings: Any) -> None:
        super().__init__(*names, **settings)
        self._late_help = late_help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """See `click.Option.get_help_record`."""
        self.help = self._late_help()
        return super().get_help_record(ctx)


def ended(end: BaseException, output: Path | None = None) -> NoReturn:
    """Report that Ctrl-C or SIGTERM ended a command that can be resumed; exit with 130 or 143."""
    terminated = isinstance(end, Terminated)
    word = "Terminated" if terminated else "Interrupted"
    where = f" --output {shlex.quote(str(output))}" if output else ""
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


# ``--offline``: no network access, whatever the environment says.

# Read by huggingface_hub, transformers and datasets when they are first imported.
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def go_offline() -> None:
    """Read models, vectors and data from local folders and caches alone."""
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    # Where a library was imported before, in a notebook or a test, it has read the switches into these.
    for module, names, key in (
        (
            "huggingface_hub.constants",
            ("HF_HUB_OFFLINE",),
            "huggingface_hub: constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE",
        ),
        (
            "datasets.config",
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
            "datasets: config.HF_HUB_OFFLINE, config.HF_DATASETS_OFFLINE",
        ),
    ):
        there = [name for name in names if hasattr(sys.modules.get(module), name)]
        if module in sys.modules and not there:
            from lm_eval_aft._util.private_names import gone

            raise gone(key)
        for name in there:
            setattr(sys.modules[module], name, True)


def _switch(_context: click.Context, _parameter: click.Parameter, on: bool) -> None:
    if on:
        go_offline()


offline_option = click.option(
    "--offline",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_switch,
    help="No network access: local folders and caches only.",
)


# ``--log``: experiment trackers.

log_option = click.option(
    "--log",
    multiple=True,
    type=click.Choice(list(TRACKERS)),
    help="Log to an experiment tracker too: TensorBoard in OUTPUT/tensorboard (pip install "
    "'lm-eval-aft[log]'), the others where they are configured to, with their own package; may repeat.",
)


# Output on terminals and in pipes whose encoding lacks some characters: Windows code pages, the C locale.

_REPLACING = "lm_eval_aft.replacing"
_ASCII = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{PLUS-MINUS SIGN}": "+/-",
    "\N{MULTIPLICATION SIGN}": "x",
}


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that Python could not decode
        return bytes([ord(character) - 0xDC00]), end
    return _ASCII.get(character, "?"), end


codecs.register_error(_REPLACING, _replace)


# Commands that report the operating system's errors in one message, like all bad input.


@contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # not about a file; a closed pipe is left to click
            raise
        place = str(error.filename or "a file")
        place = place if len(place) <= 200 else f"{place[:200]}..."
        raise AFTError(
            f"{place} cannot be used: {error.strerror}.",
            "Check the path, its permissions and the free space.",
        ) from error


class PlainCommand(click.Command):
    """A command that does, and that prints in any encoding."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See `click.Command.main`."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
            sys.stdout.reconfigure(errors=_REPLACING)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command.invoke`."""
        with _one_message():
            return super().invoke(ctx)


class PlainGroup(PlainCommand, click.Group):
    """A group whose commands do."""
