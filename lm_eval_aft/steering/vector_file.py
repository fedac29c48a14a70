"""The file of a vector, read without trusting it: its header without torch, and its tensors.

A listing reads a thousand files, and a download must be judged before any library opens it. So the header is
read here: eight bytes of length, then that many bytes of JSON. (`safe_open` would do that too, but it
imports numpy or torch, which takes longer than listing a library.)
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError, safe_open

from lm_eval_aft._util.errors import AFTError, refuse_pickle
from lm_eval_aft.steering.methods import METHODS

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "aft/1"
FILE_NAME = "vector.safetensors"

# Links are not followed, and a pipe must not make anybody wait.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# A header with 10,000 selection documents and the fingerprint of a large model stays below 1 MB.
MAX_HEADER = 16 * 2**20
# 200 layers of 32,768 fp32 numbers are 26 MB.
MAX_FILE = 256 * 2**20
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What the entry's parts, and parts of these, are where they are there at all; readers rely on it.
_KINDS: dict[str, type] = {
    **dict.fromkeys(
        ("base_model", "fingerprint", "protocol", "prompts", "splits", "selection", "loss"), dict
    ),
    **dict.fromkeys(("versions", "rft", "calibration", "recipe", "hub"), dict),
    **dict.fromkeys(("base_model.args", "selection.baseline", "selection.vector", "selection.layers"), dict),
    **dict.fromkeys(("tasks", "splits.selection_documents"), list),
    **dict.fromkeys(("task", "method", "positions", "objective", "metric", "control", "created"), str),
    **dict.fromkeys(("num_hidden_layers", "seed", "epoch", "parameters", "processes"), int),
}
# One spelling each, and no more digits than any model has layers.
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


def read_header(path: Path, *, follow: bool = False) -> Header:
    """Read and check a vector file's header; the numbers themselves are not read.

    Args:
        follow: read the file that a symbolic link leads to, rather than refuse it.

    Raises:
        AFTError: missing, a symbolic link, too large, a pickle, truncated, not a vector, or declaring
            shapes that do not fit its own length.
    """
    flags = OPEN_FLAGS & ~getattr(os, "O_NOFOLLOW", 0) if follow else OPEN_FLAGS
    try:
        with os.fdopen(os.open(path, flags), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AFTError(f"{path} is not a plain file.", "Give the file itself.")
            size, start = status.st_size, stream.read(9)
            refuse_pickle(path, start)
            length = int.from_bytes(start[:8], "little")
            check_lengths(path, size, length if len(start) >= 8 else 0)
            if len(start) < 8 or 8 + length > size:
                raise AFTError(
                    f"{path} cannot be read: truncated or not a safetensors file.", "Copy or train it again."
                )
            raw = start[8:] + stream.read(max(0, length - 1))
    except FileNotFoundError as error:
        raise AFTError(f"No steering vector at {path}.") from error
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() and not follow else error.strerror
        raise AFTError(f"{path} cannot be read: {reason}.", "Give the file itself.") from error
    try:
        declared = json.loads(raw)
        metadata = declared.pop("__metadata__", {})
        form, text = metadata.get("format"), metadata.get("aft", "null")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise AFTError(f"{path} cannot be read: its header is not that of a safetensors file.") from error
    reason = "" if form == FORMAT else f" (format {str(form)[:80]!r}, expected {FORMAT!r})"
    try:
        aft = {} if reason else parse_entry(text)
    except (ValueError, TypeError) as error:
        reason = f" (its 'aft' header: {error})"
    if reason:
        raise AFTError(
            f"{path} is a safetensors file but not a steering vector{reason}.",
            "Give a file written by train-vector.",
        )
    layers = _check_tensors(path, declared, size - 8 - length, aft)
    return Header(layers, int(aft["hidden_size"]), size, aft)


def _check_tensors(path: Path, declared: dict[str, Any], size: int, aft: dict[str, Any]) -> tuple[int, ...]:
    """The layers; raises unless every shape is the method's and the offsets fill the file."""
    width, method, spans, layers = aft.get("hidden_size"), aft.get("method"), [], []
    if method not in METHODS:
        raise unknown_method(path, method)
    extra = METHODS[method].extra_shapes(width) if isinstance(width, int) else {}
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


def unknown_method(name: object, method: object) -> AFTError:
    """What to raise for a vector of a method that this version does not have."""
    return AFTError(
        f"{name} uses method {str(method)[:80]!r}; this version knows {', '.join(METHODS)}.",
        "A newer lm-eval-aft may have written it: upgrade.",
    )


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
    for key, kind in _KINDS.items():
        whole, _, part = key.partition(".")
        value = found.get(whole)
        if part and value is not None:
            value = value.get(part)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"its {key!r} is a {type(value).__name__}, not a {kind.__name__}")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20:  # no arithmetic with it
        raise ValueError("it holds a number that is too large")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def read_tensors(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a vector file and the decoded ``aft`` entry of its header; never unpickles.

    Raises:
        AFTError: as `read_header`, but for symbolic links, which are followed.
    """
    header = read_header(source, follow=True)
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, header.metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AFTError(
            f"{source} cannot be read: truncated or not a safetensors file ({error}).",
            "Copy or train it again.",
        ) from error


def is_biased(meta: Mapping[str, Any]) -> bool:
    """Whether a vector was chosen on evaluation documents, by its metadata's own word."""
    protocol = mapping_or_empty(meta.get("protocol"))
    return bool(protocol.get("biased") or protocol.get("name") == "biased")


def recorded_share(meta: Mapping[str, Any]) -> float | None:
    """A vector's norm as a share of the median residual norm, root of the sum of squares over its layers.

    ``None`` where its metadata do not have it.

    >>> recorded_share({"share": {"3": 0.3, "4": 0.4}})
    0.5
    """
    shares = list(mapping_or_empty(meta.get("share")).values())
    fine = all(isinstance(each, int | float) and 0 <= each < math.inf for each in shares)
    return math.hypot(*shares) if shares and fine else None


def recorded_norms(meta: Mapping[str, Any]) -> dict[int, float]:
    """The median residual norm at each layer that a vector's metadata have it for."""
    found = mapping_or_empty(meta.get("residual_norm"))
    fine = {k: v for k, v in found.items() if isinstance(v, int | float) and 0 < v < math.inf}
    return {int(layer): float(norm) for layer, norm in fine.items() if str(layer).isdecimal()}


def norm_text(norm: float, share: float | None, digits: str = ".4g") -> str:
    """A norm, and what share of the median residual norm it is, where that is known.

    >>> norm_text(29.31, 0.1416), norm_text(29.31, None)
    ('29.31 (14.2 %)', '29.31')
    """
    return f"{norm:{digits}}" + ("" if share is None else f" ({100 * share:.3g} %)")


def mapping_or_empty(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
