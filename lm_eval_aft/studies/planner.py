"""What training runs and whole studies will cost, from configs alone: operations, hours and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import Document, lay_out, units
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.methods import DEFAULT_METHOD, Method, find_method
from lm_eval_aft.studies.config import ModelEntry
from lm_eval_aft.studies.jobs import StudyCell
from lm_eval_aft.studies.known_models import (
    KNOWN,
    LENGTHS,
    Lengths,
    find_config,
    typical_documents,
    with_examples,
)
from lm_eval_aft.studies.simulated_device import (
    BlankEngine,
    Device,
    Roofline,
    blank_model,
    blocks_alike,
    may_pack_blank,
    shallower,
    shapes_only,
)
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.cost import Estimate, PeakMemory, Rates, Spent
from lm_eval_aft.training.objectives import Objective, make_objective
from lm_eval_aft.training.recipe import Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.trainer import DEFAULT_TOKEN_BUDGET, TOKEN_BUDGET, master_dtype

LEAST_BUDGET = 512  # tokens; less than that is one document a pass


@dataclass(frozen=True)
class Cost:
    """What a cell costs.

    Attributes:
        candidates: candidates trained, over all stages.
        steps: optimiser steps of all candidates together.
        training, scoring: the baseline's scoring is not counted here.
        parameters, weight_bytes: the model's.
        peak_bytes: memory above the weights, at the longest documents.
    """

    candidates: int
    steps: int
    training: Spent
    scoring: Spent
    parameters: int
    weight_bytes: int
    peak_bytes: int

    @property
    def whole(self) -> Spent:
        """Training and scoring."""
        return self.training + self.scoring


class CostEstimator:
    """Costs of one model's cells on some device."""

    def __init__(self, shape: Shape, device: Device, budget: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.budget = budget or TOKEN_BUDGET.get(device.kind, DEFAULT_TOKEN_BUDGET)
        self._plans: dict[tuple[str, int, str, Protocol], PlanCost] = {}

    def cost(self, cell: StudyCell, shots: int) -> Cost:
        """One cell's."""
        plan = self._plan(cell, shots)
        return Cost(
            sum(stage.candidates for stage in plan.stages),
            plan.steps,
            Spent(plan.estimate.seconds, plan.estimate.flops),
            self.baseline(cell, shots) * (1 + cell.placebos),
            plan.parameters,
            plan.weight_bytes,
            plan.estimate.peak_bytes,
        )

    def baseline(self, cell: StudyCell, shots: int) -> Spent:
        """Scoring a cell's baseline, or one vector."""
        _, available = SIZES.get(cell.task.task, UNKNOWN_SIZES)
        return self._plan(cell, shots).scored * min(cell.task.limit or available, available)

    @staticmethod
    def assumed(cell: StudyCell) -> bool:
        """Whether the lengths of its task's documents are only guessed."""
        return not lengths_known(cell.task.task)

    def fitting_budget(self, cell: StudyCell, shots: int) -> int | None:
        """Tokens a pass may have for a cell to fit the device, halved as training does; ``None`` for none."""
        plan, budget = self._plan(cell, shots), self.budget
        if plan.fits:
            return budget
        # Memory grows with the tokens at most in proportion: what is left of it says where to begin.
        share = max(0.0, self.device.memory - plan.weight_bytes) / plan.estimate.peak_bytes
        while budget >= LEAST_BUDGET and share < 1:
            budget, share = budget // 2, share * 2
        while budget >= LEAST_BUDGET:
            if CostEstimator(self.shape, self.device, budget)._plan(cell, shots).fits:
                return budget
            budget //= 2
        return None

    def _plan(self, cell: StudyCell, shots: int) -> PlanCost:
        wanted, task = cell.plan, cell.task.task
        available, _ = SIZES.get(task, UNKNOWN_SIZES)
        selection = wanted.selection_docs or min(wanted.protocol.selection_docs, available // 2)
        train = wanted.train_docs or min(wanted.protocol.train_docs, available - selection)
        protocol = replace(wanted.protocol, train_docs=train, selection_docs=selection)
        key = (task, shots, wanted.method, protocol)
        if key not in self._plans:
            documents = typical(task, shots, protocol.share_fewshot)
            chosen_from = max(len(document.pairs) for document in documents)
            self._plans[key] = plan_cost(
                self.shape.config,
                protocol,
                documents,
                device=self.device,
                dtype=self.shape.dtype,
                objective="choice" if chosen_from > 1 else "lm",
                method=wanted.method,
                budget=self.budget,
            )
        return self._plans[key]


# A model's shape without its weights, and the lengths of its documents: what estimates start from.

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
# Lengths taken for any other task; see `lm_eval_aft.studies.known_models.LENGTHS`.
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


# What a training plan would cost on a model that is only a config, on a device that is not there.
#
# The engine itself runs, on the meta device: tensors with shapes and without contents. What it allocates
# and computes is counted by the same code that a dry run uses on a loaded model; only the clock is
# replaced, by `lm_eval_aft.studies.simulated_device`. Blocks being alike, a few of them tell what all of them
# take.

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
        config: of a causal LM; see `lm_eval_aft.studies.known_models`.
        protocol: by name, or one that was changed.
        documents: of typical lengths, the longest last; it decides the memory, the others the time.
            Those of one group (showing the same examples) share rows and steps, as in training.
            See `lm_eval_aft.studies.known_models.typical_documents`.
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
