"""What a training plan would cost on a model that is only a config, on a device that is not there.

The engine itself runs, on the meta device: tensors with shapes and without contents. What it allocates
and computes is counted by the same code that a dry run uses on a loaded model; only the clock is replaced,
by `lm_eval_aft.training.roofline`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.intervention import Intervention
from lm_eval_aft.methods import DEFAULT as DEFAULT_METHOD
from lm_eval_aft.methods import find_method
from lm_eval_aft.packability import refused
from lm_eval_aft.packing import Batch, Document
from lm_eval_aft.training.estimate import Estimate, PeakMemory, heaviest_passes
from lm_eval_aft.training.fit import Candidate, Recipe
from lm_eval_aft.training.objectives import Objective, Score, make_objective
from lm_eval_aft.training.protocols import Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.rates import Rates, Spent
from lm_eval_aft.training.roofline import Device, Roofline, shapes_only
from lm_eval_aft.training.trajectory import Trajectory, master_dtype

# A candidate's own numbers: the vector, its gradient, two moments, the best so far.
COPIES = 5


@dataclass(frozen=True)
class PlanCost:
    """What a plan would cost.

    Attributes:
        estimate: time, operations and memory above the weights, as a dry run gives them.
        parameters: of the model; ``weight_bytes`` is what they take.
        packed: whether a question's options would share a row.
        steps: optimiser steps, over all candidates.
    """

    device: Device
    estimate: Estimate
    parameters: int
    weight_bytes: int
    packed: bool
    stages: tuple[Stage, ...]
    steps: int

    @property
    def total_bytes(self) -> int:
        """Weights and everything above them; a GPU's own context (about half a GB) comes on top."""
        return self.weight_bytes + self.estimate.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.total_bytes <= self.device.memory


def plan_cost(
    config: Any,
    protocol: str | Protocol,
    documents: Sequence[Document],
    *,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    objective: str = "choice",
    method: str = DEFAULT_METHOD,
    train_docs: int | None = None,
    selection_docs: int | None = None,
    budget: int | None = None,
) -> PlanCost:
    """What one run of ``train-vector`` would cost, from a transformers config; nothing is loaded.

    Args:
        config: of a causal LM; see `lm_eval_aft.training.known_models`.
        protocol: by name, or one that was changed.
        documents: of typical lengths, the longest last; it decides the memory, the others the time.
            See `lm_eval_aft.training.known_models.typical_documents`.
        train_docs, selection_docs: as the task has them; default: as many as the protocol wants.
        budget: most tokens of a pass; default: what suits the device.

    Raises:
        AFTError: an unknown protocol, method or objective; layers that the model has not.
    """
    recipe = find_protocol(protocol) if isinstance(protocol, str) else protocol
    model = blank_model(config, dtype)
    backbone = find_backbone(model)
    layers = parse_layers(recipe.layers, len(backbone.blocks))
    how = find_method(method)
    if not how.trained:
        recipe = recipe.without_training()
    sites = layers[:1] if how.together else layers
    train = recipe.train_docs if train_docs is None else min(train_docs, recipe.train_docs)
    selection = (
        recipe.selection_docs if selection_docs is None else min(selection_docs, recipe.selection_docs)
    )
    stages = schedule(recipe, len(sites), train, selection)
    packed = may_pack_blank(model, documents)
    budget = budget or (16384 if device.kind == "cuda" else 1024)
    engine = BlankEngine(
        model, backbone, make_objective(objective, None, ["acc_norm"]), sites, packed, budget
    )

    def candidate(site: int) -> Candidate:
        tensors = how.start(
            backbone.hidden_size, tuple(layers) if how.together else (site,), torch.Generator()
        )
        placed = {name: tensor.to("meta", master_dtype(dtype)) for name, tensor in tensors.items()}
        return Candidate(site, 0, Recipe(), Intervention(how, placed))

    with shapes_only(device.kind):
        peak = _peak(engine, candidate(sites[0]), documents, recipe.batch_size, selection)
        rates = _rates(engine, candidate, documents[:-1] or documents, sites, device)
    total = rates.total(stages, recipe.seeds)
    most = max(stage.candidates for stage in stages)
    own = most * COPIES * 4 * how.parameters(backbone.hidden_size, len(layers))
    weights = [*model.parameters(), *model.buffers()]
    return PlanCost(
        device,
        Estimate(total.seconds, total.flops, peak + own),
        sum(each.numel() for each in model.parameters()),
        sum(each.numel() * each.element_size() for each in weights),
        packed,
        tuple(stages),
        sum(stage.candidates * stage.epochs * -(-stage.train // recipe.batch_size) for stage in stages),
    )


def blank_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal LM that a transformers config describes, on the meta device: shapes without contents."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def may_pack_blank(model: nn.Module, documents: Sequence[Document]) -> bool:
    """Whether a model's config and the documents allow packed rows; a loaded model is tried as well."""
    if refused(model, max(document.tokens(True) for document in documents)):
        return False
    return any(document.rows(True) < document.rows(False) for document in documents)


class BlankEngine(Trajectory):
    """The fast engine on the meta device.

    Args:
        sites: all layers of the sweep, whose frozen outputs are kept though one candidate stands for all.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        objective: Objective,
        sites: Sequence[int],
        packed: bool,
        budget: int,
    ) -> None:
        super().__init__(model, backbone, BlankObjective(objective), packed=packed, budget=budget)
        self.sites = list(sites)
        self._frozen: dict[torch.Size, dict[int, Any]] | None = None

    def outputs(self, batch: Batch, layers: Collection[int]) -> dict[int, Any]:
        """The frozen model's output at every layer of the sweep."""
        if self._frozen is None:
            return super().outputs(batch, self.sites)
        shape = batch.inputs["input_ids"].shape
        if shape not in self._frozen:
            self._frozen[shape] = super().outputs(batch, range(len(self.backbone.blocks)))
        return self._frozen[shape]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside the block, frozen passes over as many tokens as one before take nothing."""
        self._frozen = {}
        yield
        self._frozen = None


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
        try:
            self._inner.outcomes(logits, batch)
        except NotImplementedError:
            pass  # the last thing it does is to copy the contents out, and there are none
        return [np.zeros(1) for _ in batch.documents]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """A score of nothing."""
        return Score(0.0, 0.0, 0.0, 1.0, len(outcomes))


def _peak(
    engine: BlankEngine, lowest: Candidate, documents: Sequence[Document], batch_size: int, selection: int
) -> int:
    """Peak memory of the heaviest passes, at the layer that has the most to keep."""
    longest = max(documents, key=lambda document: document.tokens(True))
    together = max(1, min(selection, engine.budget // longest.tokens(True)))
    with PeakMemory("meta") as memory:
        heaviest_passes(engine, [lowest], [longest] * batch_size, [longest] * together, batch_size)
    return memory.peak


def _rates(
    engine: BlankEngine,
    candidate: Callable[[int], Candidate],
    documents: Sequence[Document],
    sites: Sequence[int],
    device: Device,
) -> Rates:
    """What documents cost, mean over sites.

    Blocks being alike, a candidate's own part grows by the same amount with each block above its layer:
    the last two layers tell it. The frozen pass is the same in training and in judging.
    """
    steps = [[document] for document in documents]
    depth = len(engine.backbone.blocks)

    def nothing(_done: int) -> None:
        pass

    def spent(work: Callable[[], Any]) -> Spent:
        with Roofline(device) as roofline:
            work()
        return roofline.spent * (1 / len(documents))

    def own(layer: int) -> tuple[Spent, Spent]:
        group = [candidate(layer)]
        judged = [
            spent(lambda document=document: engine.evaluate(group, [document], nothing))
            for document in documents
        ]
        return spent(lambda: engine.train(group, steps, nothing)), sum(judged, Spent())

    with engine.remembering():
        shared = spent(lambda: engine.train([], steps, nothing))
        train, selection = own(depth - 1)
        if depth == 1:
            return Rates(shared, train, shared, selection)
        above = depth - 1 - sum(sites) / len(sites)
        wider = own(depth - 2)
    return Rates(
        shared,
        train + wider[0].without(train) * above,
        shared,
        selection + wider[1].without(selection) * above,
    )
