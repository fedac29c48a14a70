"""``--model aft``: lm-eval's `hf` model with a steering vector."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.errors import AFTError, print_errors_plainly
from lm_eval_aft.fingerprint import fingerprint
from lm_eval_aft.library import load_vector
from lm_eval_aft.steering import SteeringHandle, attach
from lm_eval_aft.vector import POSITIONS, SteeringVector, canonical_json

logger = logging.getLogger(__name__)


class AFTLM(HFLM):
    """A Hugging Face causal LM, scored by lm-eval, with a vector added to its residual stream.

    Takes every argument of ``hf`` (``pretrained``, ``dtype``, ``revision``, ``peft``, ...) and:

    Args:
        vector: vector folder, ``.safetensors`` file or `SteeringVector`; none means baseline.
        coefficient: replaces the vector's own; 0 is the baseline.
        positions: replaces the vector's own; ``all``.
        allow_mismatch: try a vector trained on another model, with a warning.
        fast: accepted for forward compatibility; scoring takes the stock path either way.
        blocks: dotted path of the decoder blocks, for architectures not recognised.
        device: default CUDA where there is one, else the CPU.

    Raises:
        AFTError: model or vector missing, unreadable or not fitting each other.
    """

    def __init__(
        self,
        pretrained: Any,
        vector: str | SteeringVector | None = None,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
        fast: bool = True,
        blocks: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        print_errors_plainly()
        if isinstance(pretrained, str):
            pretrained = resolve_pretrained(pretrained)
        if positions is not None and positions not in POSITIONS:
            raise AFTError(f"positions={positions!r} is not known.", f"Use one of: {', '.join(POSITIONS)}.")
        # Read before the model, so that a wrong path fails in milliseconds.
        loaded = None if vector in (None, "") else load_vector(_as_path(vector))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            super().__init__(pretrained=pretrained, device=device, **kwargs)
        except OSError as error:
            raise AFTError(
                f"The model {pretrained!r} cannot be loaded: {str(error).strip().splitlines()[0]}",
                "Give a local folder written by save_pretrained, or the name of a model on the Hub.",
            ) from error
        if self.backend != "causal":
            raise AFTError("Encoder-decoder models are not supported.", "Use a decoder-only (causal) model.")
        self._blocks = blocks
        self.fast = bool(fast)
        self._vector: SteeringVector | None = None
        self._handle = SteeringHandle([])
        self.steer(loaded, coefficient=coefficient, positions=positions, allow_mismatch=bool(allow_mismatch))

    def steer(
        self,
        vector: SteeringVector | None,
        *,
        coefficient: float | None = None,
        positions: str | None = None,
        allow_mismatch: bool = False,
    ) -> None:
        """Replace the vector in force; ``None`` makes this the baseline again."""
        self._handle.remove()
        self._vector = None
        if vector is None:
            return
        vector = SteeringVector(
            vector.layers,
            vector.coefficient if coefficient is None else float(coefficient),
            positions or vector.positions,
            vector.method,
            vector.metadata,
        )
        self._handle = attach(
            self.model, vector, tokenizer=self.tokenizer, allow_mismatch=allow_mismatch, blocks=self._blocks
        )
        self._vector = vector

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Give this model and vector a table of their own in lm-eval's ``--use_cache`` file.

        lm-eval keys that file by the request alone, so a steered run would be served the
        baseline's answers. `CachingLM` looks answers up, and hooks write them, through one
        ``SqliteDict``; renaming its table here separates both.
        """
        super().set_cache_hook(cache_hook)
        database = cache_hook.dbdict
        if database is None:
            return
        table = f"aft_{hashlib.sha256(canonical_json(self._answers_depend_on()).encode()).hexdigest()[:24]}"
        database.tablename = table
        database.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table}" (key TEXT PRIMARY KEY, value BLOB)')
        database.conn.commit()

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's model information and an ``aft`` entry that says what steered it."""
        return {**super().get_model_info(), "aft": self._aft_info()}

    def _aft_info(self) -> dict[str, Any]:
        vector = self._vector
        info: dict[str, Any] = {
            "fingerprint": fingerprint(self.model, self.tokenizer),
            "world_size": self.world_size,
            "softmax_dtype": None if self.softmax_dtype is None else str(self.softmax_dtype),
            "scoring_path": "stock",
            "vector": None,
        }
        if vector is not None:
            info["vector"] = {
                "sha256": vector.digest(),
                "layers": list(vector.layers),
                "coefficient": vector.coefficient,
                "positions": vector.positions,
                "method": vector.method,
                "norm": vector.norm(),
                "task": vector.metadata.get("task"),
                "num_fewshot": vector.metadata.get("num_fewshot"),
                "control": vector.metadata.get("control"),
                # Chosen on evaluation documents, by its own word: no report may take it for a result.
                "biased": bool((vector.metadata.get("protocol") or {}).get("biased")),
                "base_model": vector.metadata.get("base_model"),
            }
        return info

    def _answers_depend_on(self) -> dict[str, Any]:
        vector = self._vector
        steered = vector is not None and vector.coefficient != 0
        return {
            "model": fingerprint(self.model, self.tokenizer),
            "vector": vector.digest() if vector is not None and steered else None,
            "dtype": str(self.model.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
        }


def _as_path(vector: Any) -> Any:
    # lm-eval turns the text of --model_args into numbers where it can.
    return str(vector) if isinstance(vector, int | float) else vector
