"""Adding vectors: one vector with the combined effect of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import torch

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.library.entry import task_names
from lm_eval_aft.steering.fingerprint import compare_fingerprints
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.steering.vector import SteeringVector, length_metadata
from lm_eval_aft.steering.vector_file import is_biased, recorded_norms

# What a composed vector keeps where all operands agree on it.
_SHARED = (
    *("num_fewshot", "prompts", "chat_template"),
    *("objective", "metric", "task_version"),
)
_UNNAMED = "an unnamed model"


@dataclass(frozen=True)
class Operand:
    """A vector in an expression, with its weight there (the vector's own coefficient not included)."""

    name: str
    weight: float
    vector: SteeringVector


def combine(operands: Sequence[Operand], expression: str | None = None) -> SteeringVector:
    """The weighted sum of vectors, layer by layer, in fp32.

    A layer that only some operands have is the sum of those. Each operand's coefficient is multiplied into
    its weight, and the sum's coefficient is 1; a single operand of weight 1 stays exactly as it is. The
    order of the operands makes no difference.

    Raises:
        AFTError: no operands; different base models, widths or positions; a method that cannot be summed;
            numbers too large.

    >>> one = SteeringVector({3: torch.ones(2)})
    >>> combine([Operand("a/b", 0.5, one), Operand("c/d", 1, one)]).layers[3]
    tensor([1.5000, 1.5000])
    """
    check_compatible(operands)
    ordered = sorted(operands, key=lambda operand: (operand.vector.digest(), operand.weight))
    metadata = _metadata(ordered, expression)
    first = ordered[0].vector
    norms = _residual_norms(ordered)
    if len(ordered) == 1 and ordered[0].weight == 1:
        kept = {key: first.metadata[key] for key in ("residual_norm", "share") if key in first.metadata}
        return replace(first, metadata=metadata | kept)
    layers: dict[int, torch.Tensor] = {}
    for operand in ordered:
        factor = operand.weight * operand.vector.coefficient
        for layer, values in operand.vector.layers.items():
            part = values * factor
            layers[layer] = layers[layer] + part if layer in layers else part
    for layer, values in layers.items():
        if not bool(torch.isfinite(values).all()):
            raise AFTError(f"The sum is too large for fp32 at layer {layer}.", "Use smaller weights.")
    metadata |= length_metadata(METHODS[first.method], layers, norms)
    return SteeringVector(layers, positions=first.positions, metadata=metadata)


def check_compatible(operands: Sequence[Operand]) -> None:
    """Raise `AFTError` unless the operands are static vectors for one and the same base model."""
    if not operands:
        raise AFTError("There is nothing to compose.", "Name at least one vector.")
    summed = [name for name, method in METHODS.items() if method.constant]
    for operand in operands:
        if not METHODS[operand.vector.method].constant:
            raise AFTError(
                f"{operand.name!r} uses the method {operand.vector.method!r}.",
                f"Only methods that add the same everywhere can be summed: {', '.join(summed)}.",
            )
    for one, other in combinations(operands, 2):
        a, b = one.vector, other.vector
        if a.positions != b.positions:
            raise AFTError(
                f"{one.name!r} steers the positions {a.positions!r}, {other.name!r} {b.positions!r}: "
                "they cannot be added."
            )
        differing = _differences(a, b)
        if differing:
            raise AFTError(
                f"{one.name!r} was trained on {_model_name(a) or _UNNAMED!r}, {other.name!r} on "
                f"{_model_name(b) or _UNNAMED!r}: "
                f"{', '.join(differing)} differ.",
                "Only vectors of one base model can be added.",
            )


def conflicts(operands: Sequence[Operand]) -> list[dict[str, Any]]:
    """How far each pair of operands points the same way, at each layer they share.

    Returns:
        Rows ``{"layer", "one", "other", "cosine", "norms", "shares"}``: the cosine lies in [-1, 1], weights'
        signs included, ``None`` where a vector is zero; norms are of the weighted vectors, in
        residual-stream units, and ``shares`` the same as shares of the median residual norm there, ``None``
        where that is not recorded.
    """
    rows, residual = [], _residual_norms(operands)
    for one, other in combinations(operands, 2):
        for layer in sorted(one.vector.layers.keys() & other.vector.layers.keys()):
            pair = [
                each.vector.layers[layer].double() * (each.weight * each.vector.coefficient)
                for each in (one, other)
            ]
            norms = [float(values.norm()) for values in pair]
            cosine = None
            if all(norm > 0 and math.isfinite(norm) for norm in norms):
                cosine = float((pair[0] / norms[0]) @ (pair[1] / norms[1]))
            names = {"layer": layer, "one": one.name, "other": other.name}
            shares = [norm / residual[layer] if layer in residual else None for norm in norms]
            rows.append({**names, "cosine": cosine, "norms": norms, "shares": shares})
    return rows


def _residual_norms(operands: Sequence[Operand]) -> dict[int, float]:
    """By layer, as the first operand that records it has measured it: they are for one model."""
    found: dict[int, float] = {}
    for operand in operands:
        found = recorded_norms(operand.vector.metadata) | found
    return found


def _differences(a: SteeringVector, b: SteeringVector) -> list[str]:
    if a.hidden_size != b.hidden_size:
        return ["hidden sizes"]
    depths = {v.metadata.get("num_hidden_layers") for v in (a, b)} - {None}
    if len(depths) > 1:
        return ["numbers of blocks"]
    recorded, other = a.metadata.get("fingerprint"), b.metadata.get("fingerprint")
    if recorded is None or other is None:  # made by hand: only names, width and depth are known
        named = {name for name in map(_model_name, (a, b)) if name is not None}
        return ["names of the base models"] if len(named) > 1 else []
    return compare_fingerprints(recorded, other)


def _metadata(operands: Sequence[Operand], expression: str | None) -> dict[str, Any]:
    metas = [operand.vector.metadata for operand in operands]
    kept: dict[str, Any] = {}
    for key in _SHARED:
        values = [meta.get(key) for meta in metas]
        if all(value == values[0] for value in values):
            kept[key] = values[0]
    kept |= _identity(metas)
    tasks = sorted({task for meta in metas for task in task_names(meta)})
    kept |= {"task": " + ".join(tasks) or None, "tasks": tasks}
    controls = sorted({str(meta["control"]) for meta in metas if meta.get("control")})
    kept["control"] = ", ".join(controls) or None
    kept["protocol"] = {"name": "composed", "biased": any(map(is_biased, metas))}
    splits = [split for meta in metas if isinstance(split := meta.get("splits"), Mapping)]
    kept["splits"] = {
        # A report asks these whether a vector was chosen on the documents it is scored on.
        "selection_documents": sorted(
            {str(each) for split in splits for each in split.get("selection_documents") or ()}
        )
    }
    kept["recipe"] = {
        "expression": expression or " + ".join(f"{o.name}*{o.weight!r}" for o in operands),
        "operands": [_described(operand) for operand in operands],
    }
    kept["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    return kept


def _identity(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which model the sum is for, all taken from one operand, so that it cannot name two models.

    Vectors made by hand may lack any of it; the operand that says most is used.
    """
    keys = ("fingerprint", "base_model", "num_hidden_layers")
    told = [{key: meta[key] for key in keys if meta.get(key) is not None} for meta in metas]
    return next((each for key in keys for each in told if key in each), {})


def _described(operand: Operand) -> dict[str, Any]:
    vector = operand.vector
    return {
        "name": operand.name,
        "weight": operand.weight,
        "coefficient": vector.coefficient,
        "sha256": vector.digest(),
        "layers": list(vector.layers),
        "tasks": list(task_names(vector.metadata)),
        **{key: vector.metadata[key] for key in ("hub", "recipe") if vector.metadata.get(key)},
    }


def _model_name(vector: SteeringVector) -> str | None:
    base = vector.metadata.get("base_model")
    return str(base["name"]) if isinstance(base, Mapping) and base.get("name") else None
