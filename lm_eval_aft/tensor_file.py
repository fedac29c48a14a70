"""Reading the file of a vector: its tensors and the entry of its header, whatever those are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lm_eval_aft.errors import AFTError, refuse_pickle
from lm_eval_aft.header_entry import check_lengths, parse_entry

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "aft/1"


def read_tensors(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the decoded ``aft`` entry of the header; never unpickles.

    Raises:
        AFTError: no file that can be read, or not of a vector's format; the tensors' names and shapes are
            not looked at.
    """
    try:
        with source.open("rb") as stream:
            start = stream.read(9)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise AFTError(f"{source} cannot be read: {error.strerror}.", "Check the path and rights.") from error
    refuse_pickle(source, start)
    check_lengths(source, size, int.from_bytes(start[:8], "little"))
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            raw = file.metadata() or {}
            if raw.get("format") != FORMAT:
                raise AFTError(
                    f"{source} is a safetensors file but not a steering vector "
                    f"(format {raw.get('format')!r}, wanted {FORMAT!r}).",
                    "Give a file written by train-vector.",
                )
            try:
                header = parse_entry(raw.get("aft", "null"))
            except ValueError as error:
                raise AFTError(
                    f"{source} has no sound 'aft' header: {error}.", "Give a file written by train-vector."
                ) from error
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AFTError(
            f"{source} cannot be read: truncated or not a safetensors file ({error}).",
            "Copy or train it again.",
        ) from error
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise AFTError(f"{source} holds tensors that are not floating point.")
    return tensors, header
