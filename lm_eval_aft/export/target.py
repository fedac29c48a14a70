"""Where an export goes: it appears there whole, or nothing does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lm_eval_aft.errors import AFTError


@contextmanager
def appearing(target: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``target``; move it there if the block succeeds.

    Whatever happens, the temporary folder goes, and so do parent folders made for it when the
    export fails.

    Args:
        target: the file or folder to make.
        expected_bytes: refuse beforehand if the disk has less room than this.

    Raises:
        AFTError: ``target`` exists, cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - a link is replaced by nothing, so not resolved
    check_absent(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < expected_bytes:
            raise AFTError(
                f"{target.parent} has {free / 1e9:.1f} GB free; "
                f"the export needs {expected_bytes / 1e9:.1f} GB.",
                "Free space or choose another place.",
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except (OSError, AFTError) as error:
        _remove_empty(missing)
        if isinstance(error, AFTError):
            raise
        raise AFTError(f"Cannot write {target}: {error.strerror}.", "Choose another place.") from error
    done = False
    try:
        # Named like the target, as some loaders look at the name.
        yield folder / target.name
        check_absent(target)
        (folder / target.name).rename(target)
        done = True
    except (OSError, SafetensorError) as error:
        raise AFTError(f"Cannot write {target}: {error}.", "Free space or choose another place.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not done:
            _remove_empty(missing)


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
