"""Commands whose errors of the operating system end in one message, like all bad input."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from lm_eval_aft.errors import AFTError


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # no error of a file; a reader that went away, click's own
            raise
        place = str(error.filename or "a file")
        place = place if len(place) <= 200 else f"{place[:200]}..."
        raise AFTError(
            f"{place} cannot be used: {error.strerror}.", "Check the path, its rights and the free space."
        ) from error


class PlainCommand(click.Command):
    """A command that tells them so."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Command.invoke`."""
        with _told():
            return super().invoke(ctx)


class PlainGroup(click.Group):
    """A group whose commands tell them so."""

    def invoke(self, ctx: click.Context) -> Any:
        """See `click.Group.invoke`."""
        with _told():
            return super().invoke(ctx)
