"""Vectors as llama.cpp control vectors, and control vectors made by other tools as vectors.

llama.cpp (``common_control_vector_load`` and ``llama_adapter_cvec``), repeng and EasySteer add tensor
``direction.N`` to the output of block N, counted from 0; llama.cpp alone refuses N = 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing
from lm_eval_aft.export.base import (
    Export,
    ExportJob,
    optional_package,
    place,
    record,
    restore,
    told_strength,
)
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import MAX_HEADER, check_lengths

ARCHITECTURE = "controlvector"
RECORD = f"{ARCHITECTURE}.aft"  # our own key: the vector's record; other readers ignore it
_MOST_BLOCKS = 10_000
# Where llama.cpp calls a family by another family's name.
_HINTS = {
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "cohere": "command-r",
    "gpt_bigcode": "starcoder",
}


def write(job: ExportJob) -> Export:
    """Write a control vector file; it is read back by the gguf package and compared bit by bit.

    Raises:
        AFTError: gguf is missing, or the file does not read back equal.
    """
    base, shifts, progress = job.base, job.shifts, job.progress
    with optional_package("gguf", "GGUF files"):
        import gguf
    hint, own = model_hint(gguf, base.config.model_type), record(job.vector, shifts)
    with appearing(job.target, 10**6) as file:
        progress("writing")
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        # The number of directions, as llama.cpp's generator and repeng write it.
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(shifts))
        writer.add_string(RECORD, own)
        for layer, delta in shifts.items():
            writer.add_tensor(f"direction.{layer}", delta.contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        progress("reading back")
        layers, described = read_gguf(file)
        wanted = {"model_hint": hint, "layer_count": len(shifts), "aft": own}
        same = layers.keys() == shifts.keys() and all(torch.equal(layers[n], shifts[n]) for n in shifts)
        if not same or described != wanted:
            raise AFTError("The control vector was deleted: it does not read back as it was written.")
    notes = [
        f"written as {', '.join(f'direction.{n}' for n in shifts)}, model hint {hint}; read back equal",
        "its logits were not compared, as that takes llama.cpp (--control-vector-scaled FILE:1 there)",
    ]
    if file_name := base.args.get("gguf_file"):
        notes.append(f"it is for {Path(base.path) / file_name} and its other quantisations")
    return Export(job.target, "gguf", None, notes)


def read(
    source: Path, model: str | None, args: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[SteeringVector, list[str]]:
    """The vector in a control vector file, and notes; without a model it carries no fingerprint.

    Raises:
        AFTError: as `read_gguf`; its record is damaged, or it does not fit the model.
    """
    layers, described = read_gguf(source)
    own = described.pop("aft", None)
    vector = SteeringVector(layers, metadata={"imported_from": {"format": "gguf", **described}})
    notes = [
        f"directions for blocks {', '.join(map(str, layers))}, hidden size {vector.hidden_size}",
        *restore(vector, own, f"{RECORD} in {source.name}"),
    ]
    if own is None:  # its own factor, and often its blocks, are given where such a file is used
        notes.append(told_strength(vector))
    return vector, notes + place(vector, model, args, progress)


def read_gguf(path: Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Read a control vector: 0-based block -> fp32 ``(hidden_size,)``, and its own description.

    Raises:
        AFTError: gguf is missing, not a control vector, damaged, or holds anything but finite F32
            directions of one width.
    """
    with optional_package("gguf", "GGUF files"):
        import gguf
    check_header(path)  # the package trusts the lengths that a file declares
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [(str(t.name), t.tensor_type.name, t.data) for t in reader.tensors]
    except (OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise AFTError(f"{path} cannot be read as GGUF: {error}.", "Copy it again.") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise AFTError(f"{path} is a GGUF file of {architecture!r}, not a control vector.")
    if sum(data.nbytes for _, _, data in tensors) > path.stat().st_size:
        raise AFTError(f"{path} holds tensors that overlap.", "Copy it again.")
    layers = _directions(path, tensors)
    described = {
        key: fields[f"{ARCHITECTURE}.{key}"]
        for key in ("model_hint", "method", "layer_count", "aft")
        if f"{ARCHITECTURE}.{key}" in fields
    }
    return layers, described


def _directions(path: Path, tensors: list[tuple[str, str, Any]]) -> dict[int, Tensor]:
    layers: dict[int, Tensor] = {}
    for name, kind, data in tensors:
        prefix, _, index = name.partition(".")
        if prefix != "direction" or not (index.isascii() and index.isdigit()):
            raise AFTError(f"{path} holds a tensor named {name!r}, which no control vector has.")
        if len(index) > len(str(_MOST_BLOCKS)) or int(index) >= _MOST_BLOCKS:
            raise AFTError(f"{path} holds {name[:40]!r}; no model has that many blocks.")
        if kind != "F32" or data.ndim != 1:
            raise AFTError(
                f"{path} holds {name} as {kind} of {data.ndim} axes; expected F32 of one axis.",
                "llama.cpp reads nothing else: write it again with numpy arrays of float32.",
            )
        if int(index) in layers:
            raise AFTError(f"{path} holds {name} twice.")
        layers[int(index)] = torch.from_numpy(data.astype(np.float32))
    if not layers:
        raise AFTError(f"{path} holds no directions.")
    return layers


def model_hint(gguf: Any, model_type: str) -> str:
    """llama.cpp's name of a transformers architecture, e.g. ``gptneox``; information only, never read."""
    model_type = _HINTS.get(model_type, model_type.removesuffix("_text"))
    plain = model_type.replace("_", "").replace("-", "")
    for name in gguf.MODEL_ARCH_NAMES.values():
        if name.replace("-", "").replace("_", "") == plain:
            return str(name)
    return model_type


# The lengths that a GGUF file declares, compared with the file before any reader trusts them.

# A control vector has a handful of entries and one tensor per block. The gguf package makes a Python object
# of every array element, so that a small file could fill the memory.
_MOST = 10_000
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a scalar type
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Check the counts and entries of a GGUF file's header.

    Raises:
        AFTError: it declares more than it holds or than a control vector can have, or nests arrays.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            check_lengths(path, size, 0)
            _walk(path, stream, size)
    except OSError as error:
        raise AFTError(f"{path} cannot be read: {error.strerror}.", "Check the path and rights.") from error


def _walk(path: Path, stream: BinaryIO, size: int) -> None:
    order = "<"

    def refuse(why: str) -> NoReturn:
        raise AFTError(f"{path} cannot be read as GGUF: {why}.", "Copy it again.")

    def number(kind: str) -> int:
        data = stream.read(struct.calcsize(kind))
        if len(data) < struct.calcsize(kind):
            refuse("it ends in the middle of its header")
        return int(struct.unpack(order + kind, data)[0])

    def count(what: str) -> int:
        found = number("Q")
        if found > _MOST:
            refuse(f"it declares {found:,} {what}, more than any control vector has")
        return found

    def skip(length: int) -> None:
        if length > size - stream.tell():
            refuse(f"it declares {length:,} bytes where fewer are left")
        stream.seek(length, 1)

    def skip_string() -> None:
        length = number("Q")
        if length > MAX_HEADER:
            refuse(f"it declares a text of {length:,} bytes")
        skip(length)

    if stream.read(4) != b"GGUF":
        refuse("it does not begin with GGUF")
    version = number("I")
    if version & 0xFFFF == 0:  # written on a machine of the other byte order
        order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        refuse(f"it is of version {version}; 2 and 3 are known")
    count("tensors")
    elements = 0
    for _ in range(count("entries")):
        skip_string()
        kind, length = number("I"), 1
        if kind == _ARRAY:
            kind, length = number("I"), count("elements in one array")
            elements += length
        if kind == _ARRAY:
            refuse("it holds arrays of arrays")
        if elements > _MOST:
            refuse("its arrays are longer than any control vector's")
        if kind == _STRING:
            for _ in range(length):
                skip_string()
        elif kind in _BYTES:
            skip(_BYTES[kind] * length)
        else:
            refuse(f"it holds a value of type {kind}, which is not known")
