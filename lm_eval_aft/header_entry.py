"""The header of a vector file: bytes from anybody, made fit for use or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from lm_eval_aft.errors import AFTError

# A header with 10,000 selection documents and the fingerprint of a large model stays below 1 MB.
MAX_HEADER = 16 * 2**20
# 200 layers of 32,768 fp32 numbers are 26 MB.
MAX_FILE = 256 * 2**20
# What the entry's parts are where they are there at all; readers rely on it.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "base_model",
            "fingerprint",
            "protocol",
            "prompts",
            "splits",
            "selection",
            "loss",
            "versions",
            "rft",
        ),
        (dict,),
    ),
    **dict.fromkeys(("calibration", "recipe", "hub"), (dict,)),
    **dict.fromkeys(("tasks",), (list,)),
    **dict.fromkeys(("task", "method", "positions", "objective", "metric", "control", "created"), (str,)),
    **dict.fromkeys(("num_hidden_layers", "seed", "epoch", "parameters", "processes"), (int,)),
}

# One spelling each, and no more digits than any model has layers.
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_lengths(path: Path, size: int, header: int) -> None:
    """Raise `AFTError` for a file, or a header that it declares, longer than any vector's (bytes)."""
    if size > MAX_FILE:
        raise AFTError(f"{path} is {size:,} bytes long; no vector is longer than {MAX_FILE:,}.")
    if header > MAX_HEADER:
        raise AFTError(
            f"{path} declares a header of {header:,} bytes; no vector has more than {MAX_HEADER:,}."
        )


def layer_index(name: str) -> int | None:
    """The 0-based block whose vector the tensor called ``name`` holds; ``None``: it holds no layer's."""
    found = _LAYER.fullmatch(name)
    return None if found is None else int(found[1])


def parse_entry(text: str) -> dict[str, Any]:
    """Read the entry.

    Raises:
        ValueError: not JSON, nested too deeply, NaN or infinite numbers, no mapping, or a part that is
            not of the kind it should be; the message says which.
    """
    try:
        found = json.loads(text, parse_constant=_refuse, parse_int=_whole)
        if _SURROGATE.search(text):  # half a character, which no file can be written with
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is no mapping")
    for key, kinds in _KINDS.items():
        value = found.get(key)
        fine = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        if not fine:
            raise ValueError(f"its {key!r} is a {type(value).__name__}, not a {kinds[0].__name__}")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20:  # no arithmetic with it
        raise ValueError("it holds a number that is too large")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")
