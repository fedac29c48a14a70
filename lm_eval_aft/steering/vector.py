"""The steering vector: its tensors, its metadata, and saving and loading it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import canonical_json, replacing
from lm_eval_aft._util.pages import RenderedTable, html_table
from lm_eval_aft.steering.intervention import POSITIONS
from lm_eval_aft.steering.methods import METHODS, Method
from lm_eval_aft.steering.vector_file import (
    FILE_NAME,
    FORMAT,
    is_biased,
    layer_index,
    read_tensors,
    recorded_share,
    unknown_method,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SteeringVector:
    """One vector (or several, one per layer) to add to a model's residual stream.

    Dynamic methods add what a function with further tensors makes of the hidden states.

    Attributes:
        layers: 0-based block index -> float32 tensor of shape ``(hidden_size,)``, added at the
            *output* of that block, in the units of the residual stream.
        coefficient: dimensionless factor applied when the vector is used.
        positions: which tokens are steered: ``"all"``, ``"prompt"``, ``"last"`` (of the prompt) or
            ``"generated"``; see `lm_eval_aft.steering.intervention`.
        method: how the intervention is parametrised; see `lm_eval_aft.steering.methods`.
        metadata: everything else the file keeps: base model and fingerprint, task, protocol,
            scores, versions (JSON-serialisable).
        extra: a dynamic method's further tensors, float32, by name (``method...``).
    """

    layers: dict[int, Tensor]
    coefficient: float = 1.0
    positions: str = "all"
    method: str = "static"
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:  # 2 and 2.0 are one coefficient, and must give one digest
            self.coefficient = float(self.coefficient)
        except (TypeError, ValueError, OverflowError) as error:
            told, reason = str(self.coefficient)[:80], "not a finite number"
            if isinstance(error, OverflowError):
                reason = "too large"
            raise AFTError(f"vector has coefficient {told}, which is {reason}.") from error
        self.layers = {int(k): v.detach().to("cpu", torch.float32) for k, v in sorted(self.layers.items())}
        self.extra = {k: v.detach().to("cpu", torch.float32) for k, v in sorted(self.extra.items())}
        self._check()

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream the vector fits."""
        return int(next(iter(self.layers.values())).shape[0])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names they have in the file."""
        return {f"layers.{layer}": values for layer, values in self.layers.items()} | self.extra

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **fields: Any) -> SteeringVector:
        """The vector with these tensors, named as in a file, and these other attributes.

        Raises:
            AFTError: they do not make a vector.
        """
        layers: dict[int, Tensor] = {}
        extra: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            layer = layer_index(key)
            if layer is not None:
                layers[layer] = tensor
            elif key.partition(".")[0] == "method":
                extra[key] = tensor
            else:
                raise AFTError(f"vector holds a tensor named {key[:80]!r}, which no vector of {FORMAT} has.")
        return cls(layers, extra=extra, **fields)

    def norm(self) -> float:
        """Euclidean norm over all layers, in residual-stream units, coefficient excluded."""
        return math.sqrt(sum(float(v.double().square().sum()) for v in self.layers.values()))

    def share(self) -> float | None:
        """The same, each layer's as a share of the median residual norm there; ``None``: not recorded."""
        return recorded_share(self.metadata)

    def digest(self) -> str:
        """SHA-256 of what the vector *does*: layers, values, coefficient, positions, method."""
        sha = hashlib.sha256(f"{self.method}|{self.positions}|{self.coefficient!r}".encode())
        for layer, values in self.layers.items():
            sha.update(f"|{layer}|".encode())
            sha.update(values.contiguous().numpy().tobytes())
        for name, values in self.extra.items():
            sha.update(f"|{name}|".encode())
            sha.update(values.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def header(self) -> dict[str, Any]:
        """What the file's header says: the metadata and the vector's own attributes."""
        return {
            **self.metadata,
            "method": self.method,
            "layers": list(self.layers),
            "coefficient": self.coefficient,
            "positions": self.positions,
            "hidden_size": self.hidden_size,
        }

    def __repr__(self) -> str:
        share = self.share()
        of = "" if share is None else f" ({100 * share:.3g} % of the residual norm)"
        task = f", task {self.metadata['task']}" if self.metadata.get("task") else ""
        where = ", ".join(map(str, self.layers))
        return f"SteeringVector({self.method}, layers {where}, norm {self.norm():.4g}{of}{task})"

    def _repr_html_(self) -> str:
        """What a notebook shows: where it steers, how strongly, and what it was trained on."""
        meta, share = self.metadata, self.share()
        base = meta.get("base_model")
        facts = {
            "layers": ", ".join(map(str, self.layers)),
            "hidden size": self.hidden_size,
            "norm": f"{self.norm():.4g}",
            "share of the residual norm": None if share is None else f"{100 * share:.3g} %",
            "coefficient": f"{self.coefficient:g}",
            "positions": self.positions,
            "method": self.method,
            "task": meta.get("task"),
            # Of a folder the end, which says enough.
            "base model": "/".join(Path(str(base.get("name"))).parts[-2:])
            if isinstance(base, Mapping)
            else None,
            "control": meta.get("control"),
        }
        lines = [(name, str(value)[:200]) for name, value in facts.items() if value is not None]
        return html_table(RenderedTable("Steering vector", ("property", "value"), lines))

    def adjusted(self, coefficient: Any = None, positions: str | None = None) -> SteeringVector:
        """This vector with another coefficient or positions; ``None`` keeps its own.

        Raises:
            AFTError: a coefficient that is not a finite number, or unknown positions.

        >>> SteeringVector({3: torch.ones(2)}).adjusted(0.5).coefficient
        0.5
        """
        try:
            factor = self.coefficient if coefficient is None else float(coefficient)
        except (TypeError, ValueError):
            raise AFTError(f"coefficient={coefficient!r} is not a number.", "Give one, as in 0.5.") from None
        return replace(self, coefficient=factor, positions=positions or self.positions)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the vector to a file (``*.safetensors``) or into a folder; return the file's path.

        The file appears whole or not at all.

        Raises:
            AFTError: the file cannot be written, or the metadata are not JSON.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            target = target / FILE_NAME
        try:
            entry = canonical_json(self.header())
            entry.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise AFTError(
                f"The vector's metadata cannot be written: {str(error)[:200]}.", "They must be finite JSON."
            ) from error
        tensors = {name: values.contiguous() for name, values in self.tensors.items()}
        with replacing(target) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "aft": entry})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Read a vector from a ``.safetensors`` file or from a vector folder.

        Raises:
            AFTError: missing, truncated, not safetensors, not a vector, mis-shaped or not finite.
        """
        source = Path(path)
        if source.is_dir():
            source = source / FILE_NAME
        if not source.is_file():
            raise AFTError(
                f"No steering vector at {source}.",
                "Give a .safetensors file or a folder that holds vector.safetensors.",
            )
        tensors, metadata = read_tensors(source)
        del metadata["layers"], metadata["hidden_size"]
        fields = {key: metadata.pop(key, None) for key in ("method", "coefficient", "positions")}
        coefficient = fields["coefficient"]
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
            raise AFTError(f"{source} declares coefficient {coefficient!r}, which is not a number.")
        try:
            return cls.from_tensors(tensors, metadata=metadata, **fields)
        except AFTError as error:
            raise AFTError(f"{source}{error.what.removeprefix('vector')}", error.hint) from error

    def _check(self) -> None:
        """Raise `AFTError` for anything that makes no vector; every message begins with "vector"."""
        if not self.layers:
            raise AFTError("vector has no layers.")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise unknown_method("vector", self.method)
        if not isinstance(self.positions, str) or self.positions not in POSITIONS:
            raise AFTError(
                f"vector uses positions {self.positions!r}; this version knows {', '.join(POSITIONS)}."
            )
        if not math.isfinite(self.coefficient):
            raise AFTError(f"vector has coefficient {self.coefficient}, which is not a finite number.")
        for layer, values in self.layers.items():
            if layer < 0:
                raise AFTError(f"vector has layer {layer}; layers are numbered from 0.")
            if values.ndim != 1 or values.shape[0] != self.hidden_size or not len(values):
                raise AFTError(
                    f"vector has shape {tuple(values.shape)} at layer {layer}; expected (hidden_size,), the "
                    "same at every layer."
                )
        method = METHODS[self.method]
        wanted = method.extra_shapes(self.hidden_size)
        held = {key: tuple(values.shape) for key, values in self.extra.items()}
        if held != wanted:
            raise AFTError(f"vector uses method {self.method!r} but holds {held} where it needs {wanted}.")
        if not method.constant and len(self.layers) > 1:
            raise AFTError(f"vector steers {len(self.layers)} layers; the method {self.method!r} steers one.")
        for key, values in self.tensors.items():
            if not bool(torch.isfinite(values).all()):
                raise AFTError(
                    f"vector holds NaN or infinite values in {key}.",
                    "The training run diverged or the file is damaged: train it again.",
                )


def residual_shares(
    method: Method, layers: Mapping[int, Tensor], norms: Mapping[int, float]
) -> dict[int, float]:
    """Each layer's norm as a share of the median norm of the hidden states there, coefficient excluded.

    Empty where a layer's ``norms`` is unknown, or where the method's ``layers.{L}`` have no unit.
    """
    if method.power("layers.") != 1 or not all(norms.get(layer, 0) > 0 for layer in layers):
        return {}
    return {layer: float(values.double().norm()) / norms[layer] for layer, values in layers.items()}


def length_metadata(
    method: Method, layers: Mapping[int, Tensor], norms: Mapping[int, float]
) -> dict[str, dict[str, float]]:
    """What a header says of a vector's length: ``residual_norm`` and ``share`` by layer, if known."""
    shares = residual_shares(method, layers, norms)
    if not shares:
        return {}
    return {
        "residual_norm": {str(layer): norms[layer] for layer in layers},
        "share": {str(layer): float(f"{share:.4g}") for layer, share in shares.items()},
    }


def describe_vector(vector: SteeringVector) -> dict[str, Any]:
    """A vector as result files describe it: what it does, what it was trained on, where it came from."""
    meta = vector.metadata
    # Trained on several tasks: the prompts of each.
    several = [each for each in meta.get("tasks") or () if isinstance(each, Mapping)]
    mixed = [{key: each.get(key) for key in ("task", "num_fewshot")} for each in several]
    return {
        "sha256": vector.digest(),
        "layers": list(vector.layers),
        "coefficient": vector.coefficient,
        "positions": vector.positions,
        "method": vector.method,
        "norm": vector.norm(),
        **({} if (share := vector.share()) is None else {"share": share}),
        "task": meta.get("task"),
        "num_fewshot": meta.get("num_fewshot"),
        "control": meta.get("control"),
        # Chosen on evaluation documents, by its own metadata: no report may take it for a result.
        "biased": is_biased(meta),
        "base_model": meta.get("base_model"),
        # A sum's operands, and the repository and commit a vector was fetched from.
        **{key: meta[key] for key in ("recipe", "hub") if meta.get(key)},
        **({"tasks": mixed} if mixed else {}),
    }
