"""The vector as a llama.cpp control vector, and control vectors made by others as vectors.

llama.cpp (``common_control_vector_load`` and ``llama_adapter_cvec``) adds tensor ``direction.N`` to the
output of block N, counted from 0, and refuses N = 0. repeng writes the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_aft.errors import AFTError
from lm_eval_aft.export.base import Base
from lm_eval_aft.export.gguf_header import check_header
from lm_eval_aft.export.provenance import record
from lm_eval_aft.export.report import Export, Progress
from lm_eval_aft.export.target import appearing
from lm_eval_aft.vector import SteeringVector

ARCHITECTURE = "controlvector"
RECORD = f"{ARCHITECTURE}.aft"  # ours: the vector's record; other readers pass over it
_MOST_BLOCKS = 10_000
# Where llama.cpp calls a family by another family's name.
_HINTS = {
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "cohere": "command-r",
    "gpt_bigcode": "starcoder",
}


def check_layers(deltas: dict[int, Tensor]) -> None:
    """Raise `AFTError` for a vector at layer 0, which the format cannot express."""
    if 0 in deltas:
        raise AFTError(
            "A llama.cpp control vector cannot act after block 0: it counts blocks from 0 and its loader "
            "refuses direction.0.",
            "Use --to merged, and convert the merged checkpoint to GGUF.",
        )


def export_gguf(
    base: Base, vector: SteeringVector, deltas: dict[int, Tensor], target: Path, progress: Progress
) -> Export:
    """Write a control vector file; it is read back by the gguf package and compared bit by bit.

    Raises:
        AFTError: a vector at layer 0, gguf is missing, or the file does not read back equal.
    """
    gguf = _library()
    check_layers(deltas)
    hint, own = model_hint(gguf, base.config.model_type), record(vector, deltas)
    with appearing(target, 10**6) as file:
        progress("writing")
        writer = gguf.GGUFWriter(file, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", hint)
        # The number of directions, as llama.cpp's generator and repeng write it.
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(deltas))
        writer.add_string(RECORD, own)
        for layer, delta in deltas.items():
            writer.add_tensor(f"direction.{layer}", delta.contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        progress("reading back")
        layers, described = read_gguf(file)
        wanted = {"model_hint": hint, "layer_count": len(deltas), "aft": own}
        same = layers.keys() == deltas.keys() and all(torch.equal(layers[n], deltas[n]) for n in deltas)
        if not same or described != wanted:
            raise AFTError("The control vector was deleted: it does not read back as it was written.")
    notes = [
        f"written as {', '.join(f'direction.{n}' for n in deltas)}, model hint {hint}; read back equal",
        "its logits were not compared, as that takes llama.cpp (--control-vector-scaled FILE:1 there)",
    ]
    return Export(target, "gguf", None, notes)


def read_gguf(path: Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Read a control vector: 0-based block -> fp32 ``(hidden_size,)``, and its own description.

    Raises:
        AFTError: gguf is missing, not a control vector, damaged, or holds anything but finite F32
            directions of one width.
    """
    gguf = _library()
    check_header(path)  # the package believes whatever lengths a file declares
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [(str(t.name), t.tensor_type.name, t.data) for t in reader.tensors]
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        MemoryError,
    ) as error:
        raise AFTError(f"{path} cannot be read as GGUF: {error}.", "Copy it again.") from error
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise AFTError(f"{path} is a GGUF file of {architecture!r}, not a control vector.")
    if sum(data.nbytes for _, _, data in tensors) > path.stat().st_size:
        raise AFTError(f"{path} holds tensors that overlap.", "Copy it again.")
    layers = _directions(path, tensors)
    described = {
        key: fields[f"{ARCHITECTURE}.{key}"]
        for key in ("model_hint", "layer_count", "aft")
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
            raise AFTError(f"{path} holds {name} as {kind} of {data.ndim} axes; F32 of one axis is wanted.")
        if int(index) in layers:
            raise AFTError(f"{path} holds {name} twice.")
        layers[int(index)] = torch.from_numpy(data.astype(np.float32))
    if not layers:
        raise AFTError(f"{path} holds no directions.")
    if 0 in layers:
        raise AFTError(f"{path} holds direction.0, which llama.cpp refuses: its meaning is not defined.")
    return layers


def model_hint(gguf: Any, model_type: str) -> str:
    """llama.cpp's name of a transformers architecture, e.g. ``gptneox``; information only, never read."""
    model_type = _HINTS.get(model_type, model_type.removesuffix("_text"))
    plain = model_type.replace("_", "").replace("-", "")
    for name in gguf.MODEL_ARCH_NAMES.values():
        if name.replace("-", "").replace("_", "") == plain:
            return str(name)
    return model_type


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise AFTError(
            "GGUF files need the gguf package.", "Install it: pip install 'lm-eval-aft[gguf]'"
        ) from error
    return gguf
