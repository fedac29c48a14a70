"""The base model an export starts from: loaded once, checked against the vector, given back early."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.errors import AFTError, model_not_loaded
from lm_eval_aft.fingerprint import check_fingerprint
from lm_eval_aft.methods import METHODS
from lm_eval_aft.private_names import require
from lm_eval_aft.steering import add_at, check_fits
from lm_eval_aft.vector import SteeringVector

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "sentencepiece.bpe.model", "tekken.json", "tokenizer.tiktoken"),
)

_MAY_BE_MISSING = "transformers: cached_file(_raise_exceptions_for_...)"


@dataclass
class Base:
    """A causal LM on the CPU in its own dtype.

    Weights read from safetensors stay memory-mapped, so loading costs memory only as they are used.

    Attributes:
        name: what the user called it; ``path`` is where it was loaded from.
        model: the transformers model in evaluation mode; ``None`` once released.
        tokenizer: its tokenizer, or ``None`` for a checkpoint without one.
        backbone: its decoder blocks.
    """

    name: str
    path: str
    revision: str | None
    model: Any
    tokenizer: Any
    backbone: Backbone

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def release(self) -> None:
        """Forget the model, so that another one can be loaded in its place."""
        self.model = None
        self.backbone = Backbone(self.backbone.name, [], self.backbone.hidden_size)
        gc.collect()

    def steered(self, deltas: dict[int, Tensor]) -> Steered:
        """Context in which each ``deltas[L]``, shape ``(hidden_size,)``, is added after block L."""
        return Steered([(self.backbone.blocks[layer], delta) for layer, delta in deltas.items()])


class Steered:
    """``with Steered(pairs):`` adds each tensor to its module's output inside the block."""

    def __init__(self, pairs: list[tuple[nn.Module, Tensor]]) -> None:
        self._pairs = pairs
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Steered:
        self._handles = [add_at(module, delta) for module, delta in self._pairs]
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()


def load_base(name: str, revision: str | None = None, blocks: str | None = None) -> Base:
    """Load a causal LM and its tokenizer from a folder, the Hub, or ``demo``.

    Raises:
        AFTError: it or its tokenizer cannot be loaded, or its blocks are not found.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_pretrained(name)
    try:
        # Left open, transformers would ask the terminal whether to run a stranger's code.
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype="auto", trust_remote_code=False
        ).eval()
    except (OSError, ValueError) as error:
        raise model_not_loaded(name, error) from error
    model.requires_grad_(False)
    return Base(name, path, revision, model, _tokenizer(name, path, revision), find_backbone(model, blocks))


def _tokenizer(name: str, path: str, revision: str | None) -> Any:
    """The tokenizer, or ``None`` for a bare checkpoint, whose weights can be exported all the same."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers, in Rust, raises nothing narrower for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        require(_MAY_BE_MISSING)
        try:
            there = [
                file
                for file in _TOKENIZER_FILES
                if cached_file(path, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            ]
        except OSError as unknown:
            raise AFTError(
                f"Whether {name!r} has a tokenizer cannot be told: {str(unknown).splitlines()[0][:300]}",
                "Give a folder that holds the whole model, or work online.",
            ) from error
        if there:
            raise AFTError(
                f"The tokenizer of {name!r} ({', '.join(there)}) cannot be read: {reason}",
                "Copy or download the model again; it may also need a package, or code of its own.",
            ) from error
    return None


def source_file(base: Base, name: str) -> Path | None:
    """A file of the base model's repository or folder, or ``None`` where it has no such file."""
    from transformers.utils import cached_file

    require(_MAY_BE_MISSING)
    try:
        found = cached_file(
            base.path,
            name,
            revision=base.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
    return None if found is None else Path(found)


def check_vector(vector: SteeringVector, base: Base, *, allow_mismatch: bool = False) -> dict[int, Tensor]:
    """What the vector adds after each block: coefficient included, fp32, shape ``(hidden_size,)``.

    Raises:
        AFTError: not a constant at every position, no effect, not finite, or made for another model.
    """
    check_constant(vector)
    check_fits(vector, base.backbone)
    check_fingerprint(vector.metadata, base.model, base.tokenizer, allow_mismatch=allow_mismatch)
    deltas = {layer: values * vector.coefficient for layer, values in vector.layers.items()}
    if not all(bool(torch.isfinite(delta).all()) for delta in deltas.values()):
        raise AFTError(
            f"The vector times its coefficient {vector.coefficient:g} overflows float32.",
            "Give a smaller --coefficient.",
        )
    if not any(bool(delta.any()) for delta in deltas.values()):
        raise AFTError(
            f"The vector times its coefficient {vector.coefficient:g} is 0: it would change nothing.",
            "Check the vector's norm, or give a larger --coefficient.",
        )
    return deltas


def check_constant(vector: SteeringVector) -> None:
    """Raise `AFTError` unless the vector adds one constant at every position."""
    stay = "Score it with `--model aft`, which applies it as it was trained."
    if not METHODS[vector.method].constant:
        raise AFTError(
            f"A vector of method {vector.method!r} cannot be exported: what it adds depends on the hidden "
            "state, and every export format holds a constant.",
            stay,
        )
    if vector.positions != "all":
        raise AFTError(
            f"A vector for positions {vector.positions!r} cannot be exported: a bias, an adapter or a "
            "control vector acts at every position.",
            stay,
        )
    if vector.coefficient == 0:
        raise AFTError(
            "The vector's coefficient is 0: it would change nothing.", "Give another --coefficient."
        )
