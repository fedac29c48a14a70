"""A model's shape without its weights, and the lengths of its documents: what estimates start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lm_eval_aft.bench.study import ModelEntry
from lm_eval_aft.errors import AFTError
from lm_eval_aft.packing import Document
from lm_eval_aft.training.blank import blank_model
from lm_eval_aft.training.known_models import (
    KNOWN,
    LENGTHS,
    Lengths,
    find_config,
    typical_documents,
    with_examples,
)

# Documents in the training and evaluation splits, with the data of the Hub.
SIZES = {
    "hellaswag": (39905, 10042),
    "arc_challenge": (1119, 1172),
    "arc_easy": (2251, 2376),
    "gsm8k": (7473, 1319),
    "aft_demo_choice": (2600, 1100),
    "aft_demo_math": (2600, 1100),
}
UNKNOWN_SIZES = (1000, 1000)
# Lengths taken for any other task; see `lm_eval_aft.training.known_models.LENGTHS`.
_UNKNOWN: tuple[tuple[Lengths, ...], int] = (((70, (15,) * 4), (180, (50,) * 4)), 90)


@dataclass(frozen=True)
class Shape:
    """What an estimate needs of a model.

    Attributes:
        config: a transformers config.
        shipped: whether it is made of numbers shipped for estimates, not read from the model's own.
        dtype: what the weights would be loaded in.
    """

    config: Any
    shipped: bool
    dtype: torch.dtype

    def model(self) -> nn.Module:
        """The model on the meta device: shapes, and no numbers."""
        return blank_model(self.config, self.dtype)


def find_shape(entry: ModelEntry) -> Shape:
    """The shape of a study's model: the numbers shipped for its Hub id, else its config.

    Raises:
        AFTError: its config can be read neither from a folder nor from the Hub.
    """
    config, shipped = find_config(entry.pretrained), entry.pretrained in KNOWN
    wanted = entry.model_args.get("dtype")
    if wanted in (None, "auto"):
        wanted = torch.bfloat16 if shipped else getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype):
        raise AFTError(f"{entry.name}: there is no dtype {wanted!r}.", "Use float32, bfloat16 or float16.")
    return Shape(config, shipped, found)


def lengths_known(task: str) -> bool:
    """Whether the lengths of a task's documents are, and not only guessed."""
    return task in LENGTHS


def typical(task: str, shots: int, share: int) -> list[Document]:
    """Documents of typical lengths with so many examples in the prompt, ``share`` of them with the same.

    Very long ones come last.
    """
    if lengths_known(task):
        return typical_documents(task, shots, share)
    lengths, example = _UNKNOWN
    return with_examples(lengths, shots * example, share)
