"""Vectors as the JSON of vllm-lens's ``SteeringVector``, which it adds after the blocks that it lists.

``activations`` is a tensor in base64, perhaps compressed: of shape (blocks, hidden_size), or with positions
between the two. What is added is ``scale`` times it, or with ``norm_match`` a share of each token's own norm.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import appearing
from lm_eval_aft.export.base import Export, ExportJob, place, told_strength
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import MAX_FILE

_DTYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8", "int16": "<i2"}  # int16: bfloat16's bits


def export_vllm_lens(job: ExportJob) -> Export:
    """Write the file, for ``SteeringVector.model_validate_json``, and read it back."""
    values = torch.stack(list(job.shifts.values())).numpy().astype("<f4")
    tensor = {"data": base64.b64encode(values.tobytes()).decode(), "dtype": "float32", "shape": values.shape}
    content = {"activations": tensor, "layer_indices": list(job.shifts), "scale": 1.0, "norm_match": False}
    with appearing(job.target, 10**6) as file:
        job.progress("writing")
        file.write_text(json.dumps(content), encoding="utf-8")
        layers, scale = _read(file)
        if scale != 1 or not all(torch.equal(layers[n], job.shifts[n]) for n in job.shifts):
            raise AFTError("The file was deleted: it does not read back as it was written.")
    notes = [
        f"written for blocks {', '.join(map(str, job.shifts))}; read back equal",
        "its logits were not compared, as that takes vLLM (SteeringVector.model_validate_json there)",
    ]
    return Export(job.target, "vllm-lens", None, notes)


def import_vllm_lens(
    source: Path, model: str | None, args: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[SteeringVector, list[str]]:
    """The vector in a file, and notes; without a model it carries no fingerprint.

    Raises:
        AFTError: damaged, not one vector for all positions, or it does not fit the model.
    """
    layers, scale = _read(source)
    vector = SteeringVector(layers, scale, metadata={"imported_from": {"format": "vllm-lens"}})
    notes = [f"for blocks {', '.join(map(str, layers))}, hidden size {vector.hidden_size}, scale {scale:g}"]
    notes += ["how the vector was made and chosen is not recorded there", told_strength(vector)]
    return vector, notes + place(vector, model, args, progress)


def _read(path: Path) -> tuple[dict[int, Tensor], float]:
    """Block -> fp32 ``(hidden_size,)``, and what they are multiplied by."""
    try:
        if path.stat().st_size > 2 * MAX_FILE:
            raise ValueError("it is too long")
        found = json.loads(path.read_text(encoding="utf-8"))
        stored, indices = found["activations"], [int(each) for each in found["layer_indices"]]
        scale, shape = float(found.get("scale", 1.0)), tuple(map(int, stored["shape"]))
        raw = base64.b64decode(stored["data"], validate=True)
        if stored.get("compression") == "zstd":
            raw = _decompressed(raw, 8 * int(np.prod(shape)))
        values = torch.from_numpy(np.frombuffer(raw, _DTYPES[stored["dtype"]]).reshape(shape).copy())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AFTError(
            f"{path} is not a steering vector of vllm-lens: {str(error)[:200] or type(error).__name__}.",
            "EasySteer's JSON files, settings and biases of expert routers, hold no vector either.",
        ) from error
    if found.get("norm_match"):
        raise AFTError(
            f"{path} has norm_match: what it adds grows with a token's hidden state, so it is no constant.",
            "Write it with norm_match=False and a scale to match.",
        )
    if len(shape) != 2 or found.get("position_indices") is not None:
        raise AFTError(
            f"{path} holds values for single positions, shape {shape}; a vector is the same at all of them.",
            "Write it with activations of shape (blocks, hidden_size).",
        )
    if len(indices) != len(values) or len(set(indices)) != len(indices):
        raise AFTError(f"{path} lists blocks {indices} for {shape[0]} rows of values.", "Write it again.")
    if "bfloat16" in str(stored.get("original_dtype")):
        values = values.view(torch.bfloat16)
    return dict(zip(indices, values.float(), strict=True)), scale


def _decompressed(data: bytes, most: int) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise AFTError(
            "This file of vllm-lens is compressed, which needs the zstandard package.",
            "Install it: pip install zstandard",
        ) from error
    try:
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=most))
    except zstandard.ZstdError as error:
        raise ValueError(f"its data are damaged ({error})") from error
