"""Which vectors fit a model, from as little of the model as will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_aft.errors import model_not_loaded
from lm_eval_aft.library.header import Header


@dataclass(frozen=True)
class Identity:
    """What of a model a vector must fit.

    Attributes:
        fingerprint: as `lm_eval_aft.fingerprint.fingerprint` gives it.
        weights: whether the weights were read; without them a fine-tuned copy passes for its origin.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    fingerprint: Mapping[str, Any]
    weights: bool


def identify(model: str, *, weights: bool = False) -> Identity:
    """Identify a model by its config and tokenizer or, if asked or if those do not do, by all of it.

    Args:
        model: local folder or Hub name.
        weights: load the weights as well.

    Raises:
        AFTError: no such model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lm_eval_aft.fingerprint import fingerprint

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded: Any = None
        if not weights:
            try:
                with torch.device("meta"):  # names and shapes, no numbers
                    loaded = AutoModelForCausalLM.from_config(config)
            except (ImportError, NotImplementedError, RuntimeError, ValueError):
                weights = True
        if weights:
            loaded = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise model_not_loaded(model, error) from error
    text = config.get_text_config()
    found = fingerprint(loaded, tokenizer)
    if getattr(config, "quantization_config", None) is not None:
        found["quantized"] = True
    return Identity(model, text.hidden_size, text.num_hidden_layers, found, weights)


def misfits(header: Header, model: Identity) -> list[str]:
    """Say in what a vector does not fit a model; an empty list means that it does."""
    from lm_eval_aft.fingerprint import compare_fingerprints

    if header.hidden_size != model.hidden_size:
        return ["hidden size"]
    if header.layers[-1] >= model.num_hidden_layers:
        return ["number of blocks"]
    recorded = header.metadata.get("fingerprint")
    if recorded is None:  # made by hand
        return []
    try:
        return compare_fingerprints(recorded, model.fingerprint)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["fingerprint (damaged)"]
