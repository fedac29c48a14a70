"""What a vector file says of itself, read without torch and without trusting the file.

A listing reads a thousand files, and a download must be judged before anything opens it. So only the
JSON header is read: eight bytes of length, then that many bytes of JSON, then the numbers.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError, refuse_pickle
from lm_eval_aft.header_entry import check_lengths, layer_index, parse_entry
from lm_eval_aft.methods import METHODS

# As lm_eval_aft.vector has them; importing that module would import torch.
FORMAT = "aft/1"
FILE_NAME = "vector.safetensors"

# Links are not followed, and a pipe must not make anybody wait.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Header:
    """The declared contents of a vector file.

    Attributes:
        layers: 0-based block indices, ascending.
        hidden_size: numbers per layer.
        size: the file's length in bytes.
        metadata: the decoded ``aft`` entry of the header.
    """

    layers: tuple[int, ...]
    hidden_size: int
    size: int
    metadata: dict[str, Any]


def read_header(path: Path) -> Header:
    """Read and check a vector file's header; the numbers themselves are not read.

    Raises:
        AFTError: missing, a symbolic link, too large, a pickle, truncated, not a vector, or declaring
            shapes that do not fit its own length.
    """
    try:
        with os.fdopen(os.open(path, OPEN_FLAGS), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AFTError(f"{path} is not a plain file.", "Give the file itself.")
            size = status.st_size
            start = stream.read(9)
            length = _header_length(path, start, size)
            raw = start[8:] + stream.read(max(0, length - 1))
    except FileNotFoundError as error:
        raise AFTError(f"No steering vector at {path}.") from error
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise AFTError(f"{path} cannot be read: {reason}.", "Give the file itself.") from error
    try:
        declared = json.loads(raw)
        metadata = declared.pop("__metadata__", {})
        form, text = metadata.get("format"), metadata.get("aft", "null")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise AFTError(f"{path} cannot be read: its header is not that of a safetensors file.") from error
    try:
        aft = parse_entry(text)
    except (ValueError, TypeError) as error:
        form, reason = None, f" ({error})"
    else:
        reason = ""
    if form != FORMAT:
        raise AFTError(
            f"{path} is a safetensors file but not a steering vector{reason}.",
            "Give a file written by train-vector.",
        )
    layers = _check_tensors(path, declared, size - 8 - length, aft)
    return Header(layers, int(aft["hidden_size"]), size, aft)


def _header_length(path: Path, start: bytes, size: int) -> int:
    refuse_pickle(path, start)
    if len(start) < 8:
        raise AFTError(f"{path} cannot be read: truncated or not a safetensors file.")
    (length,) = struct.unpack("<Q", start[:8])
    check_lengths(path, size, length)
    if 8 + length > size:
        raise AFTError(f"{path} cannot be read: truncated or not a safetensors file.")
    return int(length)


def _extra_shapes(path: Path, method: Any, width: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a vector of this method has beside its layers, by name."""
    if not isinstance(method, str) or method not in METHODS:
        raise AFTError(
            f"{path} uses method {str(method)[:80]!r}; this version knows {', '.join(METHODS)}.",
            "A newer lm-eval-aft may have written it: upgrade.",
        )
    return METHODS[method].extra(width) if isinstance(width, int) else {}


def _check_tensors(path: Path, declared: dict[str, Any], size: int, aft: dict[str, Any]) -> tuple[int, ...]:
    """The layers; raises unless every shape is the method's and the offsets fill the file."""
    width, spans, layers = aft.get("hidden_size"), [], []
    extra = _extra_shapes(path, aft.get("method"), width)
    for name, tensor in declared.items():
        layer = layer_index(name)
        if layer is None and name not in extra:
            raise AFTError(f"{path} holds a tensor named {name[:80]!r}, which no vector of {FORMAT} has.")
        wanted = list(extra[name]) if layer is None else [width]
        try:
            dtype, shape, (first, last) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
            fits = last - first == _SIZES[dtype] * math.prod(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AFTError(
                f"{path} holds a tensor {name!r} that is damaged or not floating point."
            ) from error
        if not fits or shape != wanted or isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise AFTError(
                f"{path} declares hidden_size {width!r} but a shape {str(shape)[:60]} at {name} that does "
                "not fit it or the file.",
                "The file is damaged or was tampered with: get it again.",
            )
        if layer is not None:
            layers.append(layer)
        spans.append((first, last))
    layers.sort()
    if not layers or aft.get("layers") != layers:
        raise AFTError(f"{path} declares layers {str(aft.get('layers'))[:80]} but holds {layers[:20]}.")
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise AFTError(f"{path} declares tensors that overlap or leave gaps.")
        end = last
    if end != size:
        raise AFTError(f"{path} is truncated or too long: {end:,} bytes declared, {size:,} there.")
    return tuple(layers)
