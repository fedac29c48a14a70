"""Models with shapes and without contents, and the engine on them: what a run does, not what it finds."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.packability import refused
from lm_eval_aft.packing import Batch, Document
from lm_eval_aft.training.objectives import Objective, Score
from lm_eval_aft.training.trajectory import Trajectory


def blank_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal LM that a transformers config describes, on the meta device: shapes without contents."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def shallower(config: Any, depth: int) -> Any:
    """The same config with only so many blocks."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return cut


def blocks_alike(model: nn.Module) -> bool:
    """Whether all blocks do the same work: the same parameters, and one type of layer."""
    types = getattr(getattr(model, "config", None), "layer_types", None) or [""]
    shapes = [[(n, p.shape) for n, p in block.named_parameters()] for block in find_backbone(model).blocks]
    return len(set(types)) == 1 and all(each == shapes[0] for each in shapes)


def may_pack_blank(model: nn.Module, documents: Sequence[Document]) -> bool:
    """Whether a model's config and the documents allow packed rows; a loaded model is tried as well."""
    if refused(model, max(document.tokens(True) for document in documents)):
        return False
    return any(document.rows(True) < document.rows(False) for document in documents)


class BlankObjective:
    """An objective that computes everything and knows nothing of the outcome."""

    def __init__(self, inner: Objective) -> None:
        self._inner = inner
        self.name, self.metric = inner.name, inner.metric

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """As the objective's own."""
        return self._inner.losses(logits, batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Zeros, after all the work."""
        # The last thing an objective does is to copy the contents out, and there are none.
        with suppress(NotImplementedError):
            self._inner.outcomes(logits, batch)
        return [np.zeros(1) for _ in batch.documents]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """A score of nothing."""
        return Score(0.0, 0.0, 0.0, 1.0, len(outcomes))


class BlankEngine(Trajectory):
    """The fast engine on a blank model, keeping the frozen output of every block."""

    def __init__(
        self, model: nn.Module, backbone: Backbone, objective: Objective, *, packed: bool, budget: int
    ) -> None:
        super().__init__(model, backbone, BlankObjective(objective), packed=packed, budget=budget)
        self._frozen: dict[torch.Size, dict[int, Any]] = {}
        self._laid_out: dict[tuple[Document, ...], list[Batch]] = {}
        self._remembers = False

    def lay_out(self, documents: Sequence[Document]) -> int:
        """Make the batches of these documents, once and for all; the bytes of the largest."""
        key = tuple(documents)
        if key not in self._laid_out:
            self._laid_out[key] = list(super().batches(documents))
        return max(sum(t.nbytes for t in batch.inputs.values()) for batch in self._laid_out[key])

    def batches(self, documents: Sequence[Document]) -> Iterator[Batch]:
        """As the engine's, made beforehand: how long that takes tells nothing about the device."""
        self.lay_out(documents)
        return iter(self._laid_out[tuple(documents)])

    def outputs(self, batch: Batch, layers: Collection[int]) -> dict[int, Any]:
        """The frozen model's output at every block."""
        shape = batch.inputs["input_ids"].shape
        if not (self._remembers and shape in self._frozen):
            self._frozen[shape] = super().outputs(batch, range(len(self.backbone.blocks)))
        return self._frozen[shape]

    def forget(self) -> None:
        """Let go of the outputs of frozen passes."""
        self._frozen = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the block, frozen passes over as many tokens as one before take nothing."""
        self._remembers = True
        yield
        self._remembers = False
