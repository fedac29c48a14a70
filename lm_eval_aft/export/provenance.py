"""The vector's own record in what is exported, so that it comes back with an import.

Without it a vector chosen on evaluation documents, or a placebo, would return as one of which nothing is
known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.header_entry import MAX_HEADER, parse_entry
from lm_eval_aft.library.entry import is_biased
from lm_eval_aft.vector import SteeringVector, canonical_json

# Beside an adapter or a merged checkpoint; in a GGUF file it is a string.
FILE_NAME = "aft.json"
_VALUES = "exported_values"
_ENTRIES = 32  # of each layer: enough to tell vectors apart
_TOLERANCE = 0.01  # between tools values are cast to 16 bits, and scaled
# Attributes of the vector, not of its metadata: an import sets them itself.
_ATTRIBUTES = ("method", "layers", "coefficient", "positions", "hidden_size")


def record(vector: SteeringVector, added: dict[int, Tensor]) -> str:
    """The vector's header as JSON.

    Args:
        added: what the export adds after each block; the record keeps a sketch of it, by which an import
            knows that it belongs to what lies beside it.

    Raises:
        AFTError: the metadata are no JSON.
    """
    header = {
        **vector.metadata,
        **{key: getattr(vector, key) for key in _ATTRIBUTES if key != "layers"},
        "layers": list(vector.layers),
        _VALUES: _sketch(added),
    }
    try:
        return canonical_json(header)
    except (TypeError, ValueError) as error:
        raise AFTError(f"The vector's metadata cannot be written as JSON: {error}.") from error


def write_record(folder: Path, vector: SteeringVector, added: dict[int, Tensor]) -> None:
    """Write the record into a folder; see `record`."""
    (folder / FILE_NAME).write_text(record(vector, added), encoding="utf-8")


def read_record(folder: Path) -> str | None:
    """The record in a folder, or ``None`` where there is none.

    Raises:
        AFTError: it cannot be read, or is longer than any.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return None
    try:
        if file.stat().st_size > MAX_HEADER:
            raise AFTError(f"{file} is longer than any vector's record.", "Export or download it again.")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AFTError(f"{file} cannot be read: {error}.", "Export or download it again.") from error


def restore(vector: SteeringVector, text: object, where: str) -> list[str]:
    """Give an imported vector the metadata of its record, if that belongs to it; return notes.

    Args:
        text: the record, or ``None`` where there is none.
        where: what people know it as.

    Raises:
        AFTError: the record is damaged.
    """
    if text is None:
        return ["how the vector was made and chosen is not recorded there"]
    try:
        if not isinstance(text, str) or len(text) > MAX_HEADER:
            raise ValueError("it is no text, or too long a one")
        found = parse_entry(text)
        canonical_json(found)  # 1e999 is read as infinite, which no vector file can hold
    except (ValueError, RecursionError) as error:
        raise AFTError(
            f"{where}, the vector's record, is damaged: {error}.",
            "Export or download it again.",
        ) from error
    if not _belongs(found.pop(_VALUES, None), _sketch(vector.layers)):
        return [
            f"{where} was written for other values and is ignored: how this vector was chosen is not known"
        ]
    for key in _ATTRIBUTES:
        found.pop(key, None)
    vector.metadata = {**found, **vector.metadata}
    return [f"{where} says how the vector was made", *cautions(vector)]


def cautions(vector: SteeringVector) -> list[str]:
    """What nobody should overlook who uses the vector or reads its scores, one phrase each."""
    meta = vector.metadata
    found = []
    if meta.get("control"):
        found.append(f"this is a placebo (control `{meta['control']}`), not a vector to use")
    if is_biased(meta):
        found.append(
            "this vector is biased: it was chosen on evaluation documents, so scores on them are no result"
        )
    return found


def _sketch(layers: dict[int, Tensor]) -> dict[str, Any]:
    """Per layer its norm and evenly spaced entries."""
    found = {}
    for layer, values in layers.items():
        step = torch.arange(_ENTRIES) * len(values) // _ENTRIES
        found[str(layer)] = {"norm": float(values.double().norm()), "entries": values[step].tolist()}
    return found


def _belongs(recorded: Any, present: dict[str, Any]) -> bool:
    """Whether two sketches are of the same values, up to rounding."""
    try:
        if recorded.keys() != present.keys():
            return False
        for layer, now in present.items():
            was, norm = recorded[layer], now["norm"]
            pairs = zip(was["entries"], now["entries"], strict=True)
            largest = max(map(abs, now["entries"]))
            if abs(was["norm"] - norm) > _TOLERANCE * norm:
                return False
            if any(abs(a - b) > _TOLERANCE * largest for a, b in pairs):
                return False
    except (AttributeError, KeyError, TypeError, ValueError):  # a stranger's record
        return False
    return True
