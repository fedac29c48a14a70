"""The index of a library, which spares reading a thousand headers again.

An entry of ``.index.json`` counts while the files it was read from keep their inode, length and time of
change.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_aft.library.entry import Entry
from lm_eval_aft.library.files import CARD
from lm_eval_aft.library.header import FILE_NAME

INDEX = ".index.json"
# How the names of files and folders begin that no listing shows.
ADDING = ".adding-"
_VERSION = 2  # counts up when an entry comes to say something else of the same files


def read_index(root: Path) -> dict[str, dict[str, Any]]:
    """What the index of the library at ``root`` says by name; nothing where it is missing or damaged."""
    try:
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        known = index["vectors"] if index["version"] == _VERSION else {}
        return {k: v for k, v in known.items() if isinstance(v, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_index(root: Path, found: Mapping[str, tuple[list[list[int]], Entry]]) -> None:
    """Write the index anew, whole or not at all, if the library may be written."""
    index = {k: {"state": state, "entry": entry.to_dict()} for k, (state, entry) in found.items()}
    text = json.dumps({"version": _VERSION, "vectors": index}, separators=(",", ":"))
    with contextlib.suppress(OSError):  # a library one may only read works all the same
        handle, name = tempfile.mkstemp(prefix=ADDING, dir=root)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            temporary.chmod(0o644)
            temporary.replace(root / INDEX)
        finally:
            temporary.unlink(missing_ok=True)


def state(folder: Path) -> list[list[int]]:
    """What changes when a vector or its card is written again."""
    found = []
    for name in (FILE_NAME, CARD):
        try:
            status = os.lstat(f"{folder}/{name}")
            found.append([status.st_ino, status.st_size, status.st_mtime_ns])
        except OSError:
            found.append([])
    return found
