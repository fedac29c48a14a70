"""Checking a library's vectors, file by file."""

from __future__ import annotations

import json
from pathlib import Path

from lm_eval_aft.errors import AFTError
from lm_eval_aft.library.files import SOURCE, check_folder, limit, sha256, vector_files
from lm_eval_aft.library.header import FILE_NAME, read_header


def damage(folder: Path) -> list[str]:
    """What is wrong with a vector folder: unreadable files, and any that changed since it was pulled."""
    found = []
    try:
        check_folder(folder)
        header = read_header(folder / FILE_NAME)
        depth = header.metadata.get("num_hidden_layers")
        if isinstance(depth, int) and header.layers[-1] >= depth:
            found.append(f"layer {header.layers[-1]} of a model that has {depth}")
    except (AFTError, OSError) as error:
        return [error.what if isinstance(error, AFTError) else str(error)]
    if (folder / SOURCE).is_file():
        try:
            recorded = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["files"]
            added = [name for name in vector_files(folder) if name not in recorded and name != SOURCE]
            found += [f"{name} was not pulled with it" for name in added]
            for name, digest in recorded.items():
                if limit(name) is None or not (folder / name).is_file():
                    found.append(f"{name} was pulled but is no longer there")
                elif sha256(folder / name) != digest:
                    found.append(f"{name} changed since it was pulled")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            found.append(f"{SOURCE} is damaged ({type(error).__name__})")
    return found
