"""One report in several formats: files that appear whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_aft.vector import replacing


def write_formats(texts: Mapping[str, str], folder: Path, name: str) -> list[Path]:
    """Write ``name.SUFFIX`` for each suffix and its text.

    Raises:
        AFTError: the folder cannot be written.
    """
    written = []
    for suffix, text in texts.items():
        written.append(folder / f"{name}.{suffix}")
        with replacing(written[-1]) as temporary:
            # Documents may hold half of a surrogate pair, which is no text.
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return written


def json_text(value: Any) -> str:
    """JSON with full precision; NaN and infinities, which it does not know, as null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
