"""How a plain checkpoint will hold a vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = Iterator[tuple[str, Tensor]]

PEFT_INSTEAD = "Use --to peft, which adds the vector without a place in the checkpoint."
HOOK_INSTEAD = "Use --to steered, or score it with `--model aft`; both add it after the block itself."


@dataclass(frozen=True)
class Plan:
    """How a checkpoint will hold the vector.

    Attributes:
        config: configuration of the export.
        slot: the Linear that gets the bias, by its name inside a block *of the export*.
        scale: how far a block's output moves per unit of that bias.
        convert: the base model's tensors to the export's; biases that are missing become zeros.
        route: one phrase for people.
        centred: the residual stream of the export is free of its mean, so the vector must be too.
        caution: a sentence on what the route costs elsewhere, or ``""``.
    """

    config: Any
    slot: str
    scale: float
    convert: Callable[[Tensors], Tensors]
    route: str
    centred: bool = False
    caution: str = ""


def unchanged(tensors: Tensors) -> Tensors:
    """The conversion that converts nothing."""
    yield from tensors


def skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A causal LM of this config without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
