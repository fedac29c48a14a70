"""The protocol ``onepass``: its gradients against autograd's, its search, its controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lm_eval_aft.engine.batching import Document
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import POSITIONS, Intervention
from lm_eval_aft.steering.methods import METHODS
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.objectives import LM, Choice, Objective
from lm_eval_aft.training.onepass import Gradients
from lm_eval_aft.training.trainer import Reference, Trajectory, make_engine
from tests.engine.test_engine import documents, nothing, single
from tests.support.families import FAMILIES, tiny_model

OFTEN = ("llama", "gemma2", "bloom")  # packed, behind a window, never packed
BY_TIER = [pytest.param(each, marks=[] if each in OFTEN else [pytest.mark.slow]) for each in FAMILIES]


def by_autograd(
    model: Any, objective: Objective, layer: int, docs: Sequence[Document], positions: str
) -> torch.Tensor:
    """Gradient of the mean loss at v = 0: one vector, added by the hooks that steer, on the plain engine."""
    backbone = find_backbone(model)
    reference = Reference(model, backbone, objective)
    zero = torch.zeros(backbone.hidden_size)
    probe = Candidate(layer, 0, Recipe(), Intervention(METHODS["static"], {f"layers.{layer}": zero}, 1.0, positions))
    total = sum(objective.losses(*reference.logits(doc, probe)).sum() for doc in docs) / len(docs)
    (found,) = torch.autograd.grad(total, [probe.vector])
    return found


@pytest.mark.parametrize("objective", [Choice("acc"), Choice("acc_norm"), LM()], ids=lambda o: o.metric)
@pytest.mark.parametrize("family", BY_TIER)
def test_the_pass_equals_autograd(family: str, objective: Objective) -> None:
    model = tiny_model(family)
    backbone = find_backbone(model)
    docs = single() if objective.name == "lm" else documents()
    layers = range(len(backbone.blocks))
    engine, _ = make_engine(model, backbone, objective, docs)
    found = Gradients(engine, docs, layers, list(POSITIONS)).run(nothing)
    for positions in POSITIONS:
        for layer, mean in zip(layers, found.mean(positions), strict=True):
            expected = by_autograd(model, objective, layer, docs, positions)
            assert float((mean - expected).norm() / expected.norm()) <= 1e-5, (layer, positions)
