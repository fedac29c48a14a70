"""The plain engine: one candidate, one option, one whole pass of the hooked model at a time.

Slow and obviously right; the fast engine is tested against it, and falls back to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone, input_device
from lm_eval_aft.packing import Batch, Document, make_batch
from lm_eval_aft.positions import roles, row_roles
from lm_eval_aft.steering import add_all
from lm_eval_aft.training.fit import Candidate, Tick
from lm_eval_aft.training.objectives import Objective, Score


class Reference:
    """Engine without any shortcut."""

    def __init__(self, model: nn.Module, backbone: Backbone, objective: Objective) -> None:
        self.model = model.requires_grad_(False)
        self.backbone = backbone
        self.objective = objective

    def train(self, candidates: Sequence[Candidate], steps: Sequence[Sequence[Document]], tick: Tick) -> None:
        for candidate in candidates:
            for step in steps:
                if candidate.stopped:
                    break
                for document in step:
                    logits, batch = self._logits(document, candidate)
                    candidate.backward(self.objective.losses(logits, batch).sum() / len(step))
                    tick(1)
                candidate.step()

    @torch.no_grad()
    def evaluate(
        self, candidates: Sequence[Candidate], documents: Sequence[Document], tick: Tick
    ) -> list[Score]:
        return [self._score(candidate, documents, tick) for candidate in candidates]

    @torch.no_grad()
    def baseline(self, documents: Sequence[Document], tick: Tick) -> Score:
        return self._score(None, documents, tick)

    def _score(self, candidate: Candidate | None, documents: Sequence[Document], tick: Tick) -> Score:
        outcomes: list[NDArray[np.float64]] = []
        for document in documents:
            logits, batch = self._logits(document, candidate)
            outcomes += self.objective.outcomes(logits, batch)
            tick(1)
        return self.objective.summarise(outcomes)

    def _logits(self, document: Document, candidate: Candidate | None) -> tuple[Tensor, Batch]:
        device = input_device(self.model)
        rows = []
        shifts = {} if candidate is None else candidate.intervention.shifts()
        for context, continuation in document.pairs:
            ids = torch.tensor([(*context, *continuation[:-1])], device=device)
            kinds = torch.tensor([row_roles(len(context), len(continuation) - 1)], device=device)
            with add_all(self.backbone, shifts), roles(kinds):
                logits = self.model(input_ids=ids, use_cache=False).logits[0]
            rows.append(logits[len(context) - 1 :])
        # The batch only tells the objective which row belongs to which option.
        return torch.cat(rows), make_batch([document], False, device, torch.float32)
