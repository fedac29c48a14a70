"""One process at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lm_eval_aft.errors import AFTError

logger = logging.getLogger(__name__)

LOCK = ".aft.lock"
# What file systems say that have no locks: some network mounts.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Keep other processes of ours out of an output folder while the block runs.

    The folder is made if need be, and goes again if the block leaves nothing in it. The lock belongs to
    the operating system: it ends with the process, however that dies, and what is left of its file
    keeps nobody out. Of several processes that share a run only the first asks.

    Raises:
        AFTError: another process is in there, the folder is a file, or it cannot be written.
    """
    if folder is None or int(os.environ.get("RANK", "0")) != 0:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise AFTError(f"The output {folder} is a file.", "Give a folder.")
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = FileLock(folder / LOCK)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _acquire(lock, folder)
        except OSError as error:
            raise AFTError(
                f"Cannot write into {folder}: {error.strerror or error}.", "Choose another folder."
            ) from error
        try:
            yield
        finally:
            # While it is held: a process that has opened the same file sees that it lost its name.
            with contextlib.suppress(OSError):
                if lock.is_locked:
                    (folder / LOCK).unlink()
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for each in missing:
                each.rmdir()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells when it takes a lock of another kind
            lock.acquire(blocking=False)
    except Timeout as error:
        raise AFTError(
            f"Another process is writing into {folder}.", "Wait until it has ended, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): let no other process write there.", folder, error.strerror)
