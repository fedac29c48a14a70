"""What training runs and whole studies will cost, from configs alone: operations, hours and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.model_source import model_source
from lm_eval_aft._util.settings import read_yaml
from lm_eval_aft.demo import resolve_pretrained
from lm_eval_aft.engine.batching import TokenizedDocument, lay_out, units
from lm_eval_aft.engine.checks import rows_may_be_packed
from lm_eval_aft.steering.backbone import find_backbone
from lm_eval_aft.steering.intervention import Intervention
from lm_eval_aft.steering.methods import DEFAULT_METHOD, Method, find_method
from lm_eval_aft.studies.config import ModelEntry
from lm_eval_aft.studies.jobs import StudyCell
from lm_eval_aft.studies.simulated_device import (
    Device,
    KnownOperations,
    MetaEngine,
    Roofline,
    blocks_alike,
    meta_model,
    shallower,
    shapes_only,
)
from lm_eval_aft.training.candidate import Candidate, Recipe
from lm_eval_aft.training.cost import Estimate, PeakMemory, Rates, Spent
from lm_eval_aft.training.objectives import make_objective
from lm_eval_aft.training.recipe import Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.trainer import DEFAULT_TOKEN_BUDGET, TOKEN_BUDGET, master_dtype

# Shapes of published models and lengths of well-known tasks' documents, for plans made offline: the numbers
# are in ``known_models.yaml``.

Lengths = tuple[int, tuple[int, ...]]  # tokens of the context, tokens of each continuation


@dataclass(frozen=True)
class TaskSize:
    """How many documents a task has, and how long they are.

    Attributes:
        train, evaluation: documents in those splits.
    """

    train: int
    evaluation: int
    example: int  # tokens that each few-shot example adds, on average
    lengths: tuple[Lengths, ...]  # of typical documents, the longest last

    def documents(self, num_fewshot: int = 0, share: int = 1) -> list[TokenizedDocument]:
        """Typical documents without contents; the longest comes last.

        Args:
            share: how many of each length show the same examples, where they show any.
        """
        examples = num_fewshot * self.example
        if not examples or share == 1:
            return documents_of([(examples + context, tails) for context, tails in self.lengths])
        found = []
        for group, (context, tails) in enumerate(self.lengths):
            for member in range(share):
                prompt = (0,) * examples + (1 + member,) * context
                pairs = tuple((prompt, (0,) * tail) for tail in tails)
                found.append(TokenizedDocument(pairs, (0,), tuple(map(float, tails)), group=group))
        return found


def _task_size(given: dict[str, Any]) -> TaskSize:
    return TaskSize(
        **given | {"lengths": tuple((context, tuple(tails)) for context, tails in given["lengths"])}
    )


_DATA = read_yaml(Path(__file__).with_name("known_models.yaml").read_text(encoding="utf-8"))
# Hub id -> model type, and the settings of its config that are not the default.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    model: (settings.pop("model_type"), settings) for model, settings in _DATA["models"].items()
}
TASK_SIZES = {task: _task_size(given) for task, given in _DATA["tasks"].items()}
OTHER_TASKS = _task_size(_DATA["other_tasks"])  # assumed for any task that is not listed


def find_config(model: str, model_args: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of a Hub model, local folder or GGUF file; known shapes need no network.

    Raises:
        AFTError: neither known nor to be had.
    """
    from transformers import AutoConfig

    if model in KNOWN:
        family, settings = KNOWN[model]
        return AutoConfig.for_model(family, **settings)
    model, args = model_source(model, model_args or {})
    named = {"gguf_file": args["gguf_file"]} if args.get("gguf_file") else {}
    try:
        return AutoConfig.from_pretrained(resolve_pretrained(model), **named)
    except (OSError, ValueError) as error:
        raise AFTError(
            f"The config of {model!r} cannot be had: {str(error).strip().splitlines()[0]}",
            f"Give a local folder, go online, or use one of: {', '.join(KNOWN)}.",
        ) from error


def typical_documents(task: str, num_fewshot: int = 0, share: int = 1) -> list[TokenizedDocument]:
    """Documents as long as a well-known task's, see `TaskSize.documents`.

    >>> context, answer = typical_documents("gsm8k", num_fewshot=5)[0].pairs[0]
    >>> len(context), len(answer)
    (1224, 81)

    Raises:
        AFTError: the task's lengths are not known here.
    """
    if task not in TASK_SIZES:
        raise AFTError(
            f"The lengths of the documents of {task!r} are not known.",
            f"Known: {', '.join(TASK_SIZES)}. Use documents_of with lengths of your own.",
        )
    return TASK_SIZES[task].documents(num_fewshot, share)


def documents_of(lengths: Sequence[Lengths]) -> list[TokenizedDocument]:
    """Documents of these lengths in tokens, without contents."""
    return [
        TokenizedDocument(
            tuple(((0,) * context, (0,) * tail) for tail in tails), (0,), tuple(map(float, tails))
        )
        for context, tails in lengths
    ]


# What cells take.

LEAST_BUDGET = 512  # tokens; less than that is one document a pass


class CostEstimator:
    """Costs of one model's cells on a device.

    ``shots`` is the number of examples in a cell's prompts.
    """

    def __init__(self, shape: Shape, device: Device, budget: int | None = None) -> None:
        self.shape, self.device = shape, device
        self.budget = budget or TOKEN_BUDGET.get(device.kind, DEFAULT_TOKEN_BUDGET)
        self._plans: dict[tuple[str, int, str, Protocol], PlanCost] = {}
        self._models = MetaModels(shape.config, shape.dtype)

    def spent(self, cell: StudyCell, shots: int) -> Spent:
        """Training and scoring of one cell, without its baseline's scoring."""
        estimate = self.plan(cell, shots).estimate
        scored = self.baseline(cell, shots) * (1 + cell.placebos)
        return Spent(estimate.seconds, estimate.flops) + scored

    def baseline(self, cell: StudyCell, shots: int) -> Spent:
        """Scoring a cell's baseline, or one vector."""
        available = TASK_SIZES.get(cell.task.task, OTHER_TASKS).evaluation
        return self.plan(cell, shots).scored * min(cell.task.limit or available, available)

    def fitting_budget(self, cell: StudyCell, shots: int) -> int | None:
        """Tokens of a pass at which a cell fits the device, halved as training does; ``None``: never."""
        plan, budget = self.plan(cell, shots), self.budget
        if plan.fits:
            return budget
        # Memory grows at most in proportion to the tokens: what is left of it says where to begin.
        share = max(0.0, self.device.memory - plan.weight_bytes) / plan.estimate.peak_bytes
        while budget >= LEAST_BUDGET and share < 1:
            budget, share = budget // 2, share * 2
        while budget >= LEAST_BUDGET:
            smaller = CostEstimator(self.shape, self.device, budget)
            smaller._models = self._models
            if smaller.plan(cell, shots).fits:
                return budget
            budget //= 2
        return None

    def plan(self, cell: StudyCell, shots: int) -> PlanCost:
        """What training one cell takes."""
        wanted, task = cell.plan, cell.task.task
        size = TASK_SIZES.get(task, OTHER_TASKS)
        selection = wanted.selection_docs or min(wanted.protocol.selection_docs, size.train // 2)
        train = wanted.train_docs or min(wanted.protocol.train_docs, size.train - selection)
        protocol = replace(wanted.protocol, train_docs=train, selection_docs=selection)
        key = (task, shots, wanted.method, protocol)
        if key not in self._plans:
            documents = size.documents(shots, protocol.share_fewshot)
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
                models=self._models,
            )
        return self._plans[key]


# A model's shape without its weights: what estimates start from.


@dataclass(frozen=True)
class Shape:
    """What an estimate needs of a model."""

    config: Any  # a transformers config
    shipped: bool  # whether the config is made of the numbers in ``known_models.yaml``, not the model's own
    dtype: torch.dtype  # what the weights would be loaded in


def find_shape(entry: ModelEntry) -> Shape:
    """The shape of a study's model: the numbers shipped for its Hub id, else its config.

    Raises:
        AFTError: its config can be read neither from a folder nor from the Hub.
    """
    config, shipped = find_config(entry.pretrained, entry.model_args), entry.pretrained in KNOWN
    wanted = entry.model_args.get("dtype")
    if wanted in (None, "auto"):
        wanted = torch.bfloat16 if shipped else getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype):
        raise AFTError(f"{entry.name}: there is no dtype {wanted!r}.", "Use float32, bfloat16 or float16.")
    return Shape(config, shipped, found)


# What a training plan would cost for a model known by its config alone, on a simulated device.
#
# The engine itself runs, with a model on the meta device. What it allocates and computes is counted by the
# same code that a dry run uses on a loaded model; only the clock is replaced, by `simulated_device`. As all
# blocks are alike, two small depths tell what every depth takes.

COPIES = 5  # of a candidate's numbers: the vector, its gradient, two moments, the best so far
FEW, MORE = 2, 3  # blocks of the models that are run in place of deeper ones


@dataclass(frozen=True)
class PlanCost:
    """What a plan would cost."""

    device: Device
    estimate: Estimate  # time, operations and memory above the weights, as a dry run gives them
    parameters: int  # of the model; ``weight_bytes`` is what they take
    weight_bytes: int
    packed: bool  # whether a question's options would share a row
    stages: tuple[Stage, ...]
    steps: int  # optimiser steps, over all candidates
    scored: Spent  # scoring one document's continuations

    @property
    def candidates(self) -> int:
        """Candidates trained, over all stages."""
        return sum(stage.candidates for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Memory above the weights, at the longest documents."""
        return self.estimate.peak_bytes

    @property
    def total_bytes(self) -> int:
        """Weights and everything above them; a GPU's own context (about half a GB) comes on top."""
        return self.weight_bytes + self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.total_bytes <= self.device.memory


def plan_cost(
    config: Any,
    protocol: str | Protocol,
    documents: Sequence[TokenizedDocument],
    *,
    device: Device,
    dtype: torch.dtype = torch.bfloat16,
    objective: str = "choice",
    method: str = DEFAULT_METHOD,
    train_docs: int | None = None,
    selection_docs: int | None = None,
    budget: int | None = None,
    models: MetaModels | None = None,
) -> PlanCost:
    """What one run of ``train-vector`` would cost, from a transformers config; nothing is loaded.

    Args:
        config: of a causal LM; see `find_config`.
        protocol: by name, or one that was changed.
        documents: of typical lengths, the longest last; it decides the memory, the others the time.
            Those of one group (showing the same examples) share rows and steps, as in training.
            `TaskSize.documents` makes some.
        train_docs, selection_docs: as the task has them; default: as many as the protocol wants.
        budget: most tokens of a pass; default: what suits the device.
        models: the config's, for several plans that share them and what was measured on them.

    Raises:
        AFTError: an unknown protocol, method or objective; layers that the model does not have.
    """
    recipe = find_protocol(protocol) if isinstance(protocol, str) else protocol
    how = find_method(method)
    if not how.trained:
        recipe = recipe.without_training()
    models = models or MetaModels(config, dtype)
    model, depth, width = models.whole, models.depth, find_backbone(models.whole).hidden_size
    layers = parse_layers(recipe.layers, depth)
    sites = layers[:1] if how.steers_all_layers else layers
    train, selection = (
        most if given is None else min(given, most)
        for given, most in ((train_docs, recipe.train_docs), (selection_docs, recipe.selection_docs))
    )
    stages = schedule(recipe, len(sites), train, selection)
    packed = rows_may_be_packed(model, documents)
    budget = budget or TOKEN_BUDGET.get(device.kind, DEFAULT_TOKEN_BUDGET)
    settings = (objective, packed, budget, device, tuple(documents), recipe.batch_size, selection)
    few, more = models.depths(max(document.tokens(packed) for document in documents))
    whole = models.trial_runs(few, *settings).run(how)
    if more > few:
        # What a block adds is the same with every method that trains one layer.
        usual = find_method(DEFAULT_METHOD) if how.trained and not how.steers_all_layers else how
        low, high = (models.trial_runs(each, *settings).run(usual, each == few) for each in (few, more))
        whole = whole.deeper(low, high, more - few, depth - few)
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
        sum(s.candidates * s.epochs * -(-s.train // recipe.batch_size) for s in stages) if how.trained else 0,
        whole.scored,
    )


class MetaModels:
    """A config's model on the meta device, shallower ones of its kind, and the trial runs made on them.

    Attributes:
        whole: the model itself.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.whole = meta_model(config, dtype)
        self.depth = len(find_backbone(self.whole).blocks)
        self._config, self._dtype = config, dtype
        self._shallow = {self.depth: self.whole}
        self._runs: dict[Any, _TrialRuns] = {}
        self._known: dict[Device, KnownOperations] = {}

    def depths(self, tokens: int) -> tuple[int, int]:
        """Of the models that are run in its place, on rows of at most so many tokens; twice its own: none."""
        shallow = self.depth > MORE and blocks_alike(self.whole, tokens)
        return (FEW, MORE) if shallow else (self.depth, self.depth)

    def trial_runs(self, depth: int, objective: str, *settings: Any) -> _TrialRuns:
        """Runs of the model of this depth under these settings; made once."""
        if depth not in self._shallow:
            self._shallow[depth] = meta_model(shallower(self._config, depth), self._dtype)
        key = (depth, objective, *settings)
        if key not in self._runs:
            packed, budget, device, documents, batch_size, selection = settings
            engine = MetaEngine(
                self._shallow[depth],
                find_backbone(self._shallow[depth]),
                make_objective(objective, None, ["acc_norm"]),
                packed=packed,
                budget=budget,
            )
            known = self._known.setdefault(device, {})
            self._runs[key] = _TrialRuns(engine, device, known, documents, batch_size, selection)
        return self._runs[key]


@dataclass(frozen=True)
class _Measured:
    """What a model of some depth takes.

    Attributes:
        train, selection: a candidate's own part, of a document: at the last layer, and for each block
            above its layer.
        step, judging: bytes of the heaviest passes with a candidate at layer 0, all blocks' outputs kept.
    """

    shared: tuple[Spent, Spent]  # a document's frozen pass, trained on and judged on
    scored: Spent  # a document's frozen pass with its continuations scored
    train: tuple[Spent, Spent]
    selection: tuple[Spent, Spent]
    step: float
    judging: float
    kept: tuple[float, float]  # bytes of one block's frozen output in either
    graph: float = 0.0  # bytes that a block above the candidate's layer keeps for the backward pass

    def deeper(self, few: _Measured, other: _Measured, blocks: int, more: int) -> _Measured:
        """Extrapolated to ``more`` blocks than this has, by two models of which one has ``blocks`` more."""
        factor = more / blocks
        passes = zip((*few.shared, few.scored), (*other.shared, other.scored), strict=True)
        first, second, scored = (a + b.without(a) * factor for a, b in passes)
        return _Measured(
            (first, second),
            scored,
            self.train,
            self.selection,
            self.step + (other.step - few.step) * factor,
            self.judging + (other.judging - few.judging) * factor,
            self.kept,
            (other.step - few.step) / blocks - self.kept[0],
        )

    def rates(self, above: float) -> Rates:
        """What documents cost when candidates have that many blocks above their layer, on average."""
        train, selection = (last + block * above for last, block in (self.train, self.selection))
        return Rates(self.shared[0], train, self.shared[1], selection)

    def peak(self, below: int, unkept: int) -> float:
        """Bytes with ``below`` blocks under the lowest layer; ``unkept`` blocks' outputs are dropped."""
        return max(
            self.step - below * self.graph - unkept * self.kept[0], self.judging - unkept * self.kept[1]
        )


class _TrialRuns:
    """Runs a model on a few documents. What does not depend on the method is measured once for all of them.

    Args:
        known: what operations took so far on this device.
        documents: the longest last.
        selection: how many documents are judged.
    """

    def __init__(
        self,
        engine: MetaEngine,
        device: Device,
        known: KnownOperations,
        documents: Sequence[TokenizedDocument],
        batch_size: int,
        selection: int,
    ) -> None:
        self._engine, self._device, self._known = engine, device, known
        self._depth, self._dtype = len(engine.backbone.blocks), next(engine.model.parameters()).dtype
        every = [[documents[i] for i in unit] for unit in units(documents)]
        longest, typical = max(every, key=_tokens), every[:-1] or every

        def together(unit: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
            """As many groups like this one as are judged in one pass."""
            rows = engine.budget // self._places(unit)
            return _alike(unit, max(1, min(selection // len(unit), rows)))

        self._typical = [(unit, together(unit)) for unit in typical]
        self._few, self._most = _alike(longest, -(-batch_size // len(longest))), together(longest)
        width = engine.backbone.hidden_size * self._dtype.itemsize
        places = (min(engine.budget, self._places(many)) for many in (self._few, self._most))
        self._kept = tuple(float(each * width) for each in places)
        self._measured: dict[tuple[str, bool], _Measured] = {}

    def run(self, method: Method, own: bool = True) -> _Measured:
        """What the model takes with this method.

        Args:
            own: measure a candidate's own part too; else it is left empty.
        """
        if (method.name, own) not in self._measured:
            self._measured[method.name, own] = self._run(method, own)
        return self._measured[method.name, own]

    def _run(self, method: Method, own: bool) -> _Measured:
        lowest = [self._candidate(method, 0)]
        batches = self._engine.lay_out(self._few), self._engine.lay_out(self._most)
        with shapes_only(self._device.kind):
            shared, scored = self._frozen
            step = self._peak(lambda: self._engine.train(lowest[: method.trained], [self._few], _nothing))
            judging = self._peak(lambda: self._engine.evaluate(lowest, self._most, _nothing))
            train, selected = self._candidates_part(method) if own else ((Spent(),) * 2,) * 2
        peaks = (step + batches[0], judging + batches[1])
        return _Measured(shared, scored, train, selected, *peaks, (self._kept[0], self._kept[1]))

    @cached_property
    def _frozen(self) -> tuple[tuple[Spent, Spent], Spent]:
        """A document's frozen pass in training and in judging, and one with its continuations scored."""
        scored = Spent()
        for _, many in self._typical:
            scored += self._spent(lambda: self._engine.baseline(many, _nothing)) * (1 / len(many))  # noqa: B023
        return self._passes([]), scored * (1 / len(self._typical))

    def _candidates_part(self, method: Method) -> tuple[tuple[Spent, Spent], tuple[Spent, Spent]]:
        """A candidate's own part in training and in judging: at the last layer, and of each block above."""
        with self._engine.remembering():  # the frozen passes
            last = self._passes([self._candidate(method, self._depth - 1)])
            block = self._block
            if method.steers_all_layers and self._depth > 1:
                before = self._passes([self._candidate(method, self._depth - 2)])
                block = (before[0].without(last[0]), before[1].without(last[1]))
        return (last[0], block[0] if method.trained else Spent()), (last[1], block[1])

    @cached_property
    def _block(self) -> tuple[Spent, Spent]:
        """A block above a candidate's layer, whatever the method does at that layer."""
        static, top = find_method(DEFAULT_METHOD), self._depth - 1
        last, before = (self._passes([self._candidate(static, layer)]) for layer in (top, max(0, top - 1)))
        return before[0].without(last[0]), before[1].without(last[1])

    def _passes(self, group: Sequence[Candidate]) -> tuple[Spent, Spent]:
        """A typical document trained on and judged."""
        trained = judged = Spent()
        trainable = not group or group[0].intervention.method.trained
        for unit, many in self._typical:
            if trainable:
                trained += self._spent(lambda: self._engine.train(group, [unit], _nothing)) * (1 / len(unit))  # noqa: B023
            judged += self._spent(lambda: self._engine.evaluate(group, many, _nothing)) * (1 / len(many))  # noqa: B023
        return trained * (1 / len(self._typical)), judged * (1 / len(self._typical))

    def _candidate(self, method: Method, layer: int) -> Candidate:
        layers = tuple(range(self._depth)) if method.steers_all_layers else (layer,)
        tensors = method.initial_tensors(self._engine.backbone.hidden_size, layers, torch.Generator())
        placed = {name: tensor.to("meta", master_dtype(self._dtype)) for name, tensor in tensors.items()}
        return Candidate(layer, 0, Recipe(), Intervention(method, placed))

    def _places(self, documents: Sequence[TokenizedDocument]) -> int:
        """Tokens of the documents' rows, padding included."""
        rows = lay_out(documents, self._engine.packed)
        return len(rows) * max(row.width for row in rows)

    def _peak(self, work: Callable[[], Any]) -> int:
        with self._engine.from_nothing(), Roofline(self._device, self._known), PeakMemory("meta") as memory:
            work()
        return int(memory.peak)

    def _spent(self, work: Callable[[], Any]) -> Spent:
        with Roofline(self._device, self._known) as roofline:
            work()
        spent: Spent = roofline.spent
        return spent


def _alike(unit: Sequence[TokenizedDocument], times: int) -> list[TokenizedDocument]:
    """That many copies of a group of documents."""
    return [d if d.group is None else replace(d, group=k) for k in range(times) for d in unit]


def _tokens(unit: Sequence[TokenizedDocument]) -> int:
    return max(document.tokens(True) for document in unit)


def _nothing(_done: int) -> None:
    pass
