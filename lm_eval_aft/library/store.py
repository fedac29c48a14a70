"""A library: a folder of categories, each a folder of vector folders, with an index beside them.

The folders are the truth; the index only saves time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import replacing
from lm_eval_aft.library.entry import Entry, read_entry
from lm_eval_aft.library.files import (
    CARD,
    check_folder,
    check_name,
    copy_vector,
    is_name,
    suggestion,
)
from lm_eval_aft.steering.vector_file import FILE_NAME

# A temporary folder this old (seconds) belongs to a process that died.
STALE = 3600.0
# How the names of temporary folders begin, which no listing shows.
_ADDING, _REPLACED, _REMOVED = ".adding-", ".replaced-", ".removed-"


def default_library() -> Path:
    """``$AFT_LIBRARY``, or the folder for libraries among the user's data."""
    given = os.environ.get("AFT_LIBRARY")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_data_dir("lm-eval-aft", appauthor=False)) / "library"


class Library:
    """A folder of vectors. It need not exist before the first ``add``."""

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = Path(root) if root is not None else default_library()

    def names(self) -> list[str]:
        """All names, in order, of folders that hold a ``vector.safetensors``."""
        return sorted(name for name, _ in self._folders())

    def path(self, name: str) -> Path:
        """The folder of a vector.

        Raises:
            AFTError: no such vector (the nearest names are suggested), or its category is a link.
        """
        folder = self.root / name
        if is_name(name):
            _check_category(folder.parent)
        if not is_name(name) or not os.path.lexists(folder / FILE_NAME):
            known = self.names()
            hint = suggestion(name, known) or (
                "See `aft vectors list`." if known else "It is empty: `aft vectors add` fills it."
            )
            raise AFTError(f"The library {self.root} has no vector {name!r}.", hint)
        return folder

    def entry(self, name: str) -> Entry:
        """One vector's description, read from its files rather than the index."""
        return read_entry(name, self.path(name))

    def entries(self) -> list[Entry]:
        """Every vector's description, in order of name; damaged ones carry an ``error``.

        Raises:
            AFTError: the library is there but cannot be read.
        """
        known, found, fresh = read_index(self.root), {}, False
        for name, folder in sorted(self._folders()):
            key = state(folder)
            entry = None
            if name in known and known[name].get("state") == key:
                with contextlib.suppress(TypeError, KeyError, ValueError):
                    entry = Entry.from_dict(known[name]["entry"])
            if entry is None:
                entry, fresh = read_entry(name, folder), True
            found[name] = (key, entry)
        if fresh or len(found) != len(known):
            write_index(self.root, found)
        return [entry for _, entry in found.values()]

    def add(self, source: str | os.PathLike[str], name: str, *, replace: bool = False) -> Path:
        """Copy a vector folder or a lone ``.safetensors`` file into the library; return its folder.

        The vector is checked, copied beside its place and renamed, so that it appears whole or not at
        all, whatever other processes do meanwhile.

        Raises:
            AFTError: not a vector, a symbolic link, the name taken (unless ``replace``) or the library
                not writable.
        """
        with self.adding(name, replace=replace) as temporary:
            copy_vector(Path(source), temporary)
        return self.root / name

    @contextmanager
    def adding(self, name: str, *, replace: bool = False) -> Iterator[Path]:
        """Yield an empty folder whose contents become the vector ``name`` when the block ends.

        Raises:
            AFTError: as `add`.
        """
        target = self.root / check_name(name)
        if not replace and os.path.lexists(target):
            raise _taken(self.root, name)
        with self.temporary(name) as temporary:
            yield temporary
            check_folder(temporary)
            self.move_in(temporary, name, replace=replace)

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """Yield a folder inside the library that no listing shows; it is deleted when the block ends.

        Args:
            name: what error messages call it.

        Raises:
            AFTError: the library is not writable; or raised in the block.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            place = Path(tempfile.mkdtemp(prefix=_ADDING, dir=self.root))
        except OSError as error:
            raise AFTError(
                f"Cannot write into the library {self.root}: {error.strerror}.",
                "Choose another with --library or AFT_LIBRARY.",
            ) from error
        inner = place / "vector"
        try:
            inner.mkdir()
            yield inner
        except AFTError as error:
            raise AFTError(error.what.replace(str(inner), name), error.hint) from error
        except OSError as error:
            reason = str(error).replace(str(inner), name)
            raise AFTError(f"Cannot write into the library {self.root}: {reason}.") from error
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Delete a vector, and its category when that was the last one.

        Raises:
            AFTError: no such vector, or no right to delete it.
        """
        folder = self.path(name)
        try:
            shutil.rmtree(self._set_aside(folder, name, _REMOVED, []), ignore_errors=True)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as error:
            raise AFTError(f"Cannot remove {folder}: {error.strerror}.") from error
        with contextlib.suppress(OSError):  # not empty
            folder.parent.rmdir()

    def move_in(self, temporary: Path, name: str, *, replace: bool = False) -> None:
        """Rename a checked folder from `temporary` to its place.

        Unlike `lm_eval_aft._util.files.appearing` while others add, replace and remove the same name, and so
        that the next process restores what one that was killed had set aside.

        Raises:
            AFTError: the name is taken, or the library not writable.
        """
        target, aside = self.root / check_name(name), list[Path]()
        _check_category(target.parent)
        try:
            for _ in range(1000):
                try:
                    with contextlib.suppress(FileExistsError):  # exist_ok=True looks again, too late
                        target.parent.mkdir()
                    temporary.rename(target)
                    break
                except FileNotFoundError:  # somebody removed the last vector of the category just now
                    continue
                except OSError as error:
                    if not target.is_dir():
                        raise AFTError(f"Cannot write {target}: {error.strerror}.") from error
                    if not replace:
                        raise _taken(self.root, name) from error
                    # A rename cannot replace a full folder. Dying before the next one leaves the old vector
                    # where `_clean` finds it.
                    with contextlib.suppress(FileNotFoundError):
                        self._set_aside(target, name, _REPLACED, aside)
            else:
                raise AFTError(f"Other processes keep changing {target}.", "Try again.")
        except BaseException:  # Ctrl-C too
            for old in reversed(aside):  # the newest first: the others were replaced before it
                _put_back(old, target)
            raise
        for old in aside:
            _drop(old)

    def _set_aside(self, folder: Path, name: str, prefix: str, kept: list[Path]) -> Path:
        """Move a vector's folder into a new one, which is added to ``kept`` before anything moves."""
        aside = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
        kept.append(aside)
        try:
            folder.rename(aside / name.replace("/", ","))
        except OSError:
            kept.remove(aside)
            aside.rmdir()
            raise
        return aside

    def _clean(self) -> None:
        """Delete temporary folders of processes that died; restore a vector that one was replacing."""
        for each in self.root.iterdir():
            with contextlib.suppress(OSError):
                if not each.name.startswith((_ADDING, _REPLACED, _REMOVED, f".{INDEX}.")):
                    continue
                # A long download writes file after file, while its folder stays as old as its first.
                if time.time() - max(path.lstat().st_mtime for path in (each, *each.rglob("*"))) < STALE:
                    continue
                if each.name.startswith(_REPLACED):
                    for old in each.iterdir():
                        target = self.root / old.name.replace(",", "/")
                        if not target.exists():
                            old.rename(target)
                if each.is_dir():
                    shutil.rmtree(each, ignore_errors=True)
                else:
                    each.unlink()

    def _folders(self) -> Iterator[tuple[str, Path]]:
        try:
            categories = [c for c in os.scandir(self.root) if c.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return
        except OSError as error:
            raise AFTError(f"The library {self.root} cannot be read: {error.strerror}.") from error
        for category in categories:
            with contextlib.suppress(OSError):  # removed, or not for us
                for each in os.scandir(category.path):
                    name = f"{category.name}/{each.name}"
                    if not (is_name(name) and each.is_dir(follow_symlinks=False)):
                        continue
                    if os.path.lexists(f"{each.path}/{FILE_NAME}"):
                        yield name, Path(each.path)


def _check_category(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(folder.lstat().st_mode):  # a link may lead out of the library
            raise AFTError(f"{folder} is a symbolic link or a file.", "Choose another category.")


def _put_back(aside: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # `_clean` tries again
        for old in aside.iterdir():
            if not os.path.lexists(target):
                target.parent.mkdir(exist_ok=True)
                old.rename(target)
        aside.rmdir()


def _drop(aside: Path) -> None:
    # Renamed first: half-deleted, it must not come back.
    gone = aside.with_name(aside.name.replace(_REPLACED, _REMOVED))
    with contextlib.suppress(OSError):
        aside.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _taken(root: Path, name: str) -> AFTError:
    return AFTError(f"The library {root} already has {name!r}.", "Choose another name, or add --replace.")


# The index of a library, which saves reading a thousand headers again.
#
# An entry of ``.index.json`` is valid while the files it was read from keep their inode, length and time of
# change.

INDEX = ".index.json"
_VERSION = 2  # counts up when an entry comes to say something else of the same files


def read_index(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of the index of the library at ``root`` by name; none where it is missing or damaged."""
    try:
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        known = index["vectors"] if index["version"] == _VERSION else {}
        return {k: v for k, v in known.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_index(root: Path, found: Mapping[str, tuple[list[list[int]], Entry]]) -> None:
    """Replace the index, if the library can be written."""
    index = {k: {"state": state, "entry": entry.to_dict()} for k, (state, entry) in found.items()}
    text = json.dumps({"version": _VERSION, "vectors": index}, separators=(",", ":"))
    # A library that may only be read works all the same.
    with contextlib.suppress(AFTError), replacing(root / INDEX) as temporary:
        temporary.write_text(text, encoding="utf-8")


def state(folder: Path) -> list[list[int]]:
    """Inode, length and time of change of the vector and its card: they differ once either is rewritten."""
    found = []
    for name in (FILE_NAME, CARD):
        try:
            status = os.lstat(f"{folder}/{name}")
            found.append([status.st_ino, status.st_size, status.st_mtime_ns])
        except OSError:
            found.append([])
    return found
