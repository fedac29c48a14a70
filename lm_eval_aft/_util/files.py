"""Writing files so that they appear whole or not at all, and keeping a folder to one process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.process import is_main_process

logger = logging.getLogger(__name__)
LOCK = ".aft.lock"
_FREE_SPACE = "Free some space or choose another place."
# Errors of file systems without locks, such as some network mounts.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def exists(path: Path) -> bool:
    """Whether there is a file or folder; false for what cannot be a path, as a long expression."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file name, or a null byte in it
        return False


@contextmanager
def exclusive_dir(folder: Path | None) -> Iterator[None]:
    """Keep other processes of this package out of an output folder while the block runs.

    The folder is made if need be, and removed if the block leaves nothing in it. The lock belongs to the
    operating system: it ends with the process, however that dies, and a lock file left behind keeps nobody
    out. Of several processes that share a run only the first takes it.

    Raises:
        AFTError: another process holds the folder, it is a file, or it cannot be written.
    """
    if folder is None or not is_main_process():
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
            # Removed while the lock is held: a process that has opened the same file sees that it is gone.
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
            warnings.simplefilter("ignore")  # about falling back to another kind of lock
            lock.acquire(blocking=False)
    except Timeout as error:
        raise AFTError(
            f"Another process is writing into {folder}.", "Wait until it has ended, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): let no other process write there.", folder, error.strerror)


# Files and folders that appear complete or not at all.


@contextmanager
def _told(target: Path, hint: str) -> Iterator[None]:
    """Inside the block an error in writing is one message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AFTError(f"Cannot write {target}: {reason}.", hint) from error


@contextmanager
def appearing(target: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``target``; move it there if the block succeeds.

    The temporary folder is removed in any case, and so are parent folders made for it if the block fails.

    Args:
        target: the file or folder to make.
        expected_bytes: refuse beforehand if the disk has less room than this.

    Raises:
        AFTError: ``target`` exists, cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link is replaced by nothing, so not resolved
    check_absent(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    with contextlib.ExitStack() as undone:
        undone.callback(_remove_empty, missing)
        with _told(target, "Choose another place."):
            target.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(target.parent).free
            if free < expected_bytes:
                raise AFTError(
                    f"{target.parent} has {free / 1e9:.1f} GB free; "
                    f"the export needs {expected_bytes / 1e9:.1f} GB.",
                    _FREE_SPACE,
                )
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        undone.callback(shutil.rmtree, folder, ignore_errors=True)
        with _told(target, _FREE_SPACE):
            # Named like the target, as some loaders look at the name.
            yield folder / target.name
            check_absent(target)
            (folder / target.name).rename(target)
        undone.pop_all()
    shutil.rmtree(folder, ignore_errors=True)


def check_absent(target: Path) -> None:
    """Raise `AFTError` if there is something at ``target``."""
    if target.exists() or target.is_symlink():
        raise AFTError(f"{target} exists already.", "Choose another place, or remove it first.")


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        try:
            folder.rmdir()
        except OSError:
            return


def canonical_json(value: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces, so that equal contents give equal bytes.

    >>> canonical_json({"b": 1, "a": [0.5]})
    '{"a":[0.5],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it there if the block succeeds.

    Raises:
        AFTError: the place cannot be written (missing rights, no space).
    """
    with _told(target, "Choose another place."):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with _told(target, _FREE_SPACE):
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())  # else a loss of power may leave the new name with an empty file
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp gives 0600, which would not survive sharing
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing_dir(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``; it takes the place of what is there if the block succeeds.

    What a killed process left of its folder is deleted, so keep other processes out (`exclusive_dir`).
    """
    begun = target.with_name(f".{target.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    yield begun
    shutil.rmtree(target, ignore_errors=True)
    begun.rename(target)


class JsonLines:
    """A ledger: a file with one JSON object a line, that one process appends to.

    A last line that sudden death cut short is passed over by `read` and dropped by the next `append`.

    Args:
        listener: is called with each line that was written.
    """

    def __init__(self, path: Path, listener: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self.listener = path, listener

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none where there is no file."""
        import jsonlines  # not at the top: every command imports this module

        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:  # bytes: a cut may lie within a character
            return list(jsonlines.Reader(stream).iter(type=dict, skip_invalid=True))

    def append(self, **line: Any) -> None:
        """Write one line at once."""
        import jsonlines

        self._drop_cut_line()
        with jsonlines.open(self.path, "a") as writer:
            writer.write(line)
        if self.listener:
            self.listener(line)

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replace the whole file, at once."""
        import jsonlines

        with replacing(self.path) as temporary, jsonlines.open(temporary, "w") as writer:
            writer.write_all(lines)

    def _drop_cut_line(self) -> None:
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with self.path.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
