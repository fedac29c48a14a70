"""Signals, which process is the main one, other libraries' messages, and the time."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The process was asked to end; uncaught, it ends with exit code 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


@contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM raises `Terminated` in it, so that it can clean up."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    with _handling(handler):
        yield


@contextmanager
def postponed() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM interrupts nothing; the yielded function says whether one arrived.

    The block should raise `Terminated` when it has saved its work; otherwise this does at its end.
    """
    came: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    with _handling(handler):
        yield lambda: bool(came)
    if came:
        raise Terminated


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM, unless the calling program does, or this is not the main thread."""
    before: Any = signal.getsignal(signal.SIGTERM)
    free = before is signal.SIG_DFL or getattr(before, "_aft", False)
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler._aft = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Keep other libraries' messages and progress bars out of the output; call before heavy imports."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("lm_eval", "datasets", "transformers", "accelerate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lm_eval_aft").setLevel(logging.INFO)
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Whether this process is the first of those that `accelerate launch` or `torchrun` started, or the only
    one.

    By the launcher's variable, so that it holds before the processes have joined each other.
    """
    return int(os.environ.get("RANK", "0")) == 0


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
