"""What a training plan would cost on a model that is only a config, on a device that is not there.

The engine itself runs, on the meta device: tensors with shapes and without contents. What it allocates
and computes is counted by the same code that a dry run uses on a loaded model; only the clock is replaced,
by `lm_eval_aft.training.roofline`. Blocks being alike, a few of them tell what all of them take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.documents import Document, lay_out, units
from lm_eval_aft.intervention import Intervention
from lm_eval_aft.methods import DEFAULT as DEFAULT_METHOD
from lm_eval_aft.methods import Method, find_method
from lm_eval_aft.training.blank import BlankEngine, blank_model, blocks_alike, may_pack_blank, shallower
from lm_eval_aft.training.estimate import Estimate, PeakMemory
from lm_eval_aft.training.fit import Candidate, Recipe
from lm_eval_aft.training.objectives import Objective, make_objective
from lm_eval_aft.training.protocols import Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.rates import Rates, Spent
from lm_eval_aft.training.roofline import Device, Roofline, shapes_only
from lm_eval_aft.training.trajectory import DEFAULT_TOKEN_BUDGET, TOKEN_BUDGET, master_dtype

# A candidate's own numbers: the vector, its gradient, two moments, the best so far.
COPIES = 5
# Blocks of the models that are run in place of deeper ones.
FEW, MORE = 3, 5


@dataclass(frozen=True)
class PlanCost:
    """What a plan would cost.

    Attributes:
        estimate: time, operations and memory above the weights, as a dry run gives them.
        parameters: of the model; ``weight_bytes`` is what they take.
        packed: whether a question's options would share a row.
        steps: optimiser steps, over all candidates.
        scored: reading one document, its continuations scored: what an evaluation costs for each.
    """

    device: Device
    estimate: Estimate
    parameters: int
    weight_bytes: int
    packed: bool
    stages: tuple[Stage, ...]
    steps: int
    scored: Spent

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
            Those of one group (showing the same examples) share rows and steps, as in training.
            See `lm_eval_aft.training.known_models.typical_documents`.
        train_docs, selection_docs: as the task has them; default: as many as the protocol wants.
        budget: most tokens of a pass; default: what suits the device.

    Raises:
        AFTError: an unknown protocol, method or objective; layers that the model has not.
    """
    recipe = find_protocol(protocol) if isinstance(protocol, str) else protocol
    how = find_method(method)
    if not how.trained:
        recipe = recipe.without_training()
    model = blank_model(config, dtype)
    depth, width = len(find_backbone(model).blocks), find_backbone(model).hidden_size
    layers = parse_layers(recipe.layers, depth)
    sites = layers[:1] if how.together else layers
    train, selection = (
        most if given is None else min(given, most)
        for given, most in ((train_docs, recipe.train_docs), (selection_docs, recipe.selection_docs))
    )
    stages = schedule(recipe, len(sites), train, selection)
    packed = may_pack_blank(model, documents)
    budget = budget or TOKEN_BUDGET.get(device.kind, DEFAULT_TOKEN_BUDGET)
    trial = _Trial(
        make_objective(objective, None, ["acc_norm"]), how, packed, budget, device, list(documents), dtype
    )
    depths = (FEW, MORE) if depth > MORE and blocks_alike(model) else (depth,)
    found = [trial.run(shallower(config, each), recipe.batch_size, selection) for each in depths]
    whole = found[0] if len(found) == 1 else found[0].deeper(found[1], MORE - FEW, depth - FEW)
    total = whole.rates(depth - 1 - sum(sites) / len(sites)).total(stages, recipe.seeds)
    peak = int(whole.peak(sites[0], depth - len(sites)))
    own = COPIES * 4 * how.parameters(width, len(layers)) * max(stage.candidates for stage in stages)
    return PlanCost(
        device,
        Estimate(total.seconds, total.flops, peak + own),
        sum(each.numel() for each in model.parameters()),
        sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers())),
        packed,
        tuple(stages),
        _steps(stages, recipe.batch_size) if how.trained else 0,
        whole.scored,
    )


def _steps(stages: Sequence[Stage], batch_size: int) -> int:
    return sum(stage.candidates * stage.epochs * -(-stage.train // batch_size) for stage in stages)


@dataclass(frozen=True)
class _Found:
    """What a model of some depth takes.

    Attributes:
        shared: a document's frozen pass, trained on and judged on.
        scored: a document's frozen pass with its continuations scored.
        train, selection: a candidate's own part, of a document: at the last layer, and for each block
            above its layer.
        step, judging: bytes of the heaviest passes with a candidate at layer 0, all blocks' outputs kept.
        kept: bytes of one block's frozen output in either.
        graph: bytes that a block above the candidate's layer keeps for the backward pass.
    """

    shared: tuple[Spent, Spent]
    scored: Spent
    train: tuple[Spent, Spent]
    selection: tuple[Spent, Spent]
    step: float
    judging: float
    kept: tuple[float, float]
    graph: float = 0.0

    def deeper(self, other: _Found, blocks: int, more: int) -> _Found:
        """Carried on by ``more`` blocks, from one with so many ``blocks`` more than this."""
        factor = more / blocks
        passes = zip((*self.shared, self.scored), (*other.shared, other.scored), strict=True)
        first, second, scored = (a + b.without(a) * factor for a, b in passes)
        return _Found(
            (first, second),
            scored,
            self.train,
            self.selection,
            self.step + (other.step - self.step) * factor,
            self.judging + (other.judging - self.judging) * factor,
            self.kept,
            (other.step - self.step) / blocks - self.kept[0],
        )

    def rates(self, above: float) -> Rates:
        """What documents cost when candidates have so many blocks above their layer, on average."""
        train, selection = (last + block * above for last, block in (self.train, self.selection))
        return Rates(self.shared[0], train, self.shared[1], selection)

    def peak(self, below: int, unkept: int) -> float:
        """Bytes when the lowest layer has so many blocks below, and so many blocks' outputs are not kept."""
        return max(
            self.step - below * self.graph - unkept * self.kept[0], self.judging - unkept * self.kept[1]
        )


@dataclass(frozen=True)
class _Trial:
    """Runs models of some depth on a few documents."""

    objective: Objective
    method: Method
    packed: bool
    budget: int
    device: Device
    documents: Sequence[Document]
    dtype: torch.dtype

    def run(self, config: Any, batch_size: int, selection: int) -> _Found:
        """What the config's model takes; the last two layers tell what a block above a layer adds."""
        model = blank_model(config, self.dtype)
        backbone = find_backbone(model)
        engine = BlankEngine(model, backbone, self.objective, packed=self.packed, budget=self.budget)
        depth = len(backbone.blocks)
        every = [[self.documents[i] for i in unit] for unit in units(self.documents)]
        longest, typical = max(every, key=_tokens), every[:-1] or every

        def together(unit: Sequence[Document]) -> list[Document]:
            """As many like these as are judged in one pass."""
            rows = engine.budget // self._places(unit)
            return _alike(unit, max(1, min(selection // len(unit), rows)))

        def spent(group: Sequence[Candidate]) -> tuple[Spent, Spent]:
            trained = judged = Spent()
            for unit in typical:
                many, own = together(unit), 1 / len(unit)
                if self.method.trained or not group:
                    trained += self._spent(lambda: engine.train(group, [unit], _nothing)) * own  # noqa: B023
                judged += self._spent(lambda: engine.evaluate(group, many, _nothing)) * (1 / len(many))  # noqa: B023
            return trained * (1 / len(typical)), judged * (1 / len(typical))

        def baseline() -> Spent:
            scored = Spent()
            for unit in typical:
                many = together(unit)
                scored += self._spent(lambda: engine.baseline(many, _nothing)) * (1 / len(many))  # noqa: B023
            return scored * (1 / len(typical))

        lowest, most = [self._candidate(backbone, 0)], together(longest)
        few = _alike(longest, -(-batch_size // len(longest)))
        step, judging = engine.lay_out(few), engine.lay_out(most)
        for unit in typical:
            engine.lay_out(unit)
            engine.lay_out(together(unit))
        with shapes_only(self.device.kind):
            stepped = lowest if self.method.trained else []
            step += self._peak(engine, lambda: engine.train(stepped, [few], _nothing))
            judging += self._peak(engine, lambda: engine.evaluate(lowest, most, _nothing))
            shared, scored = spent([]), baseline()
            with engine.remembering():
                last = spent([self._candidate(backbone, depth - 1)])
                before = spent([self._candidate(backbone, depth - 2)]) if depth > 1 else last
        width = backbone.hidden_size * self.dtype.itemsize
        kept = tuple(float(min(engine.budget, self._places(many)) * width) for many in (few, most))
        train, selected = ((a, b.without(a)) for a, b in zip(last, before, strict=True))
        return _Found(shared, scored, train, selected, step, judging, (kept[0], kept[1]))

    def _candidate(self, backbone: Backbone, layer: int) -> Candidate:
        layers = tuple(range(len(backbone.blocks))) if self.method.together else (layer,)
        tensors = self.method.start(backbone.hidden_size, layers, torch.Generator())
        placed = {name: tensor.to("meta", master_dtype(self.dtype)) for name, tensor in tensors.items()}
        return Candidate(layer, 0, Recipe(), Intervention(self.method, placed))

    def _places(self, documents: Sequence[Document]) -> int:
        """Tokens, padding included, of the rows that documents take."""
        rows = lay_out(documents, self.packed)
        return len(rows) * max(row.width for row in rows)

    def _peak(self, engine: BlankEngine, work: Callable[[], Any]) -> int:
        engine.forget()
        with PeakMemory("meta") as memory:
            work()
        engine.forget()
        return int(memory.peak)

    def _spent(self, work: Callable[[], Any]) -> Spent:
        with Roofline(self.device) as roofline:
            work()
        return Spent(roofline.spent.seconds, roofline.spent.flops)


def _alike(unit: Sequence[Document], times: int) -> list[Document]:
    """So many groups like this one, or documents like these."""
    return [d if d.group is None else replace(d, group=k) for k in range(times) for d in unit]


def _tokens(unit: Sequence[Document]) -> int:
    return max(document.tokens(True) for document in unit)


def _nothing(_done: int) -> None:
    pass
