"""Preparing a plan: its model, tasks, documents and controls, the candidates' initialization, the screen."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import (
    Batch,
    TokenizedDocument,
    capture,
    continuation_logits,
    make_batch,
    token_budget_batches,
)
from lm_eval_aft.engine.checks import require_finite
from lm_eval_aft.engine.precision import to_training_dtype
from lm_eval_aft.harness.examples import Example, Extractor
from lm_eval_aft.harness.grading import Marker
from lm_eval_aft.harness.model_args import refuse_steering
from lm_eval_aft.harness.splits import MixedSplits, Splits, split_task, split_tasks
from lm_eval_aft.harness.tasks import compiled_once, find_tasks, load_tasks
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.backbone import Backbone, find_backbone
from lm_eval_aft.steering.hooks import hidden_states, with_hidden_states
from lm_eval_aft.steering.intervention import GENERATED, Intervention
from lm_eval_aft.steering.methods import DEFAULT_METHOD, METHODS, Method, find_method
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.training.objectives import CONTROLS, OBJECTIVES, Mixture, Objective, make_objective
from lm_eval_aft.training.recipe import Stage, TrainingPlan, parse_layers, schedule
from lm_eval_aft.training.trainer import Trajectory, master_dtype


@dataclass
class TaskPart:
    """One of the tasks trained on: its own objective and splits."""

    name: str
    objective: Objective
    splits: Splits

    @property
    def num_fewshot(self) -> int:
        """Examples in each of its prompts."""
        return self.splits.extractor.num_fewshot


@dataclass
class Prepared:
    """A plan with its model, tasks and documents, before any training.

    Attributes:
        objective, splits: the task's own; with several tasks, a mixture of ``parts``.
    """

    plan: TrainingPlan
    lm: AFTLM
    backbone: Backbone
    objective: Objective
    splits: Splits | MixedSplits
    layers: list[int]
    parts: list[TaskPart]

    @property
    def method(self) -> Method:
        """How the intervention is parametrised."""
        return find_method(self.plan.method)

    @property
    def sites(self) -> list[int]:
        """The layers that get candidates: only the first, where a method steers all at once."""
        return self.layers[:1] if self.method.steers_all_layers else self.layers

    def stages(self) -> list[Stage]:
        """What will be trained, before any retry."""
        drawn, judged = self.splits.drawn, len(self.splits.selection)
        return schedule(self.plan.protocol, len(self.sites), drawn, judged)

    def summary(self) -> dict[str, Any]:
        """What a dry run prints, name by name."""
        protocol = self.plan.protocol.to_dict()
        return {
            "model": str(self.lm.pretrained),
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "task": ",".join(part.name for part in self.parts),
            "num_fewshot": ", ".join(dict.fromkeys(str(part.num_fewshot) for part in self.parts)),
            "objective": self.objective.name,
            "metric": self.objective.metric,
            **({"note": self.objective.note} if self.objective.note else {}),
            **({"loss": str(self.objective.loss)} if self.objective.loss else {}),
            "control": self.plan.control or "none",
            "method": f"{self.method.name}: h + {self.method.formula}",
            "parameters": self.method.parameters(self.backbone.hidden_size, len(self.layers)),
            "positions": self.plan.positions,
            "calibrate": self.plan.calibrate,
            "norm_cap": self.plan.norm_cap,
            **{f"rft: {key}": value for key, value in _rounds(self).items()},
            "screen": self.plan.screen,
            "protocol": protocol.pop("name"),
            **{
                key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v
                for key, v in (protocol | {"layers": self.layers}).items()
            },
            "train_docs": self.splits.train_docs,
            "selection_docs": len(self.splits.selection),
            **{f"documents: {key}": value for key, value in self.splits.counts.items()},
            **{
                f"task {part.name}": f"{part.splits.drawn} train, {len(part.splits.selection)} selection, "
                f"{part.num_fewshot}-shot, {part.objective.metric}"
                for part in (self.parts if len(self.parts) > 1 else [])
            },
        }


def _rounds(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    if plan.rft is None:
        return {}
    marker = Marker(prepared.parts[0].splits.extractor.task, plan.rft.filter, plan.metric)
    return {**asdict(plan.rft), "filter": marker.filter, "marked by": marker.metric}


Documents = tuple[list[Extractor], Splits | MixedSplits]


def load_model(model: str | AFTLM, model_args: Mapping[str, Any] | None = None) -> AFTLM:
    """The model to train on: by name with lm-eval's arguments, or as it is given.

    Loaded without a ``dtype``, it gets the fastest one, see `lm_eval_aft.engine.precision`.

    Raises:
        AFTError: it cannot be loaded, is steered, or gives NaN or infinite numbers in this dtype.
    """
    refuse_steering(model_args or {}, "a vector is trained on the model alone")
    if isinstance(model, AFTLM):
        model.require_plain()
    lm = model if isinstance(model, AFTLM) else AFTLM(model, **(model_args or {}))
    if lm is not model and "dtype" not in (model_args or {}):
        to_training_dtype(lm.model)
    require_finite(lm)
    return lm


def prepare(lm: AFTLM, plan: TrainingPlan, kept: dict[Any, Documents] | None = None) -> Prepared:
    """Check a plan against its model and task, and build the documents it needs.

    Args:
        kept: documents of earlier plans for this model; plans that differ in their recipe only share them.

    Raises:
        AFTError: anything that the plan asks for and that is not possible.
    """
    backbone = find_backbone(lm.model)
    layers = parse_layers(plan.protocol.layers, len(backbone.blocks))
    _check_intervention(plan)
    wanted: dict[str, Any] = {
        "train_docs": plan.train_docs,
        "selection_docs": plan.selection_docs,
        "train_split": plan.train_split,
        "most": (plan.protocol.train_docs, plan.protocol.selection_docs),
        "share": plan.protocol.share_fewshot,
    }
    asked = (
        plan.task,
        plan.prompts,
        plan.include_path,
        str(plan.task_metadata),
        plan.metric,
        *wanted.values(),
    )
    known = None if kept is None else kept.get(asked)
    extractors = known[0] if known else _extractors(plan, lm)
    names = [str(extractor.task.config.task) for extractor in extractors]
    name = _objective_name(plan, extractors)
    check_control(plan.control, name)
    objectives = [_objective(plan, name, extractor) for extractor in extractors]
    splits = known[1] if known else _split(extractors, names, wanted)
    if kept is not None:
        kept[asked] = (extractors, splits)
    objective = Mixture(objectives, names) if isinstance(splits, MixedSplits) else objectives[0]
    own = splits.parts if isinstance(splits, MixedSplits) else [splits]
    parts = [TaskPart(*each) for each in zip(names, objectives, own, strict=True)]
    return Prepared(plan, lm, backbone, objective, splits, layers, parts)


def _extractors(plan: TrainingPlan, lm: AFTLM) -> list[Extractor]:
    """One for each task that the plan's tasks, groups and patterns stand for."""
    model = lm.pretrained if isinstance(lm.pretrained, str) else getattr(lm.pretrained, "name_or_path", "")
    # As lm-eval does: tasks that build their documents for a model are given it.
    metadata = {"pretrained": model, **lm.model_args, **(plan.task_metadata or {})}
    found = load_tasks(*find_tasks(plan.tasks, plan.include_path, metadata))["tasks"]
    return [Extractor(task, lm, plan.prompts) for task in found.values()]


def _split(extractors: list[Extractor], tasks: list[str], wanted: dict[str, Any]) -> Splits | MixedSplits:
    with compiled_once():
        if len(extractors) == 1:
            return split_task(extractors[0], **wanted)
        return split_tasks(extractors, tasks, **wanted)


def _check_intervention(plan: TrainingPlan) -> None:
    method = find_method(plan.method)
    if plan.norm_cap is not None and not (plan.norm_cap > 0 and method.constant):
        raise AFTError(
            f"A norm cap of {plan.norm_cap:g} does not fit the method {plan.method!r}.",
            "It is a positive share of the residual norm, for methods that add the same everywhere.",
        )
    if plan.protocol.one_pass and not (method.constant and method.trained):
        raise AFTError(
            f"The protocol {plan.protocol.name!r} does not fit the method {plan.method!r}: one backward pass "
            "gives vectors that are the same at every token.",
            "Choose --protocol adaptive.",
        )
    if plan.positions == "auto" and not plan.protocol.one_pass:
        raise AFTError(
            f"The protocol {plan.protocol.name!r} cannot choose positions.", "Use --protocol onepass."
        )
    if plan.protocol.one_pass and plan.screen != "off":
        raise AFTError("The search of one pass ranks the layers itself.", "Leave out --screen.")
    check_screen(plan.screen, plain=plan.method == DEFAULT_METHOD and plan.positions == "all")


def _objective_name(plan: TrainingPlan, extractors: Sequence[Extractor]) -> str:
    """The objective asked for, or the one for the tasks' output type; each task must allow it."""
    own = {str(extractor.task.config.task): extractor.objective for extractor in extractors}
    wanted = plan.objective or extractors[0].objective
    if len(set(own.values())) > 1:
        told = ", ".join(f"{name} {objective!r}" for name, objective in own.items())
        raise AFTError(
            f"These tasks have different objectives: {told}.",
            "A vector is trained with one: choose tasks of one type.",
        )
    if OBJECTIVES[wanted].samples:
        _check_rft(plan, extractors)
    elif wanted != extractors[0].objective:
        raise AFTError(
            f"The objective {wanted!r} does not fit {plan.task!r}.", f"Use {extractors[0].objective}."
        )
    return wanted


def _objective(plan: TrainingPlan, name: str, extractor: Extractor) -> Objective:
    task = extractor.task
    reported = list(task.aggregation())
    found = make_objective(
        name,
        plan.metric,
        reported,
        choice_loss=plan.choice_loss,
        margin=plan.margin,
        label_smoothing=plan.label_smoothing,
    )
    extractor.in_bytes = found.metric == "acc_bytes"
    computed = "process_results" if callable(task.config.process_results) else ""
    if found.loss and (computed or not {*found.metrics} & {*reported}):
        found.note = (
            f"The task {task.config.task!r} reports {', '.join(reported)}"
            f"{', computed by code of its own (process_results)' if computed else ''}. Training and every "
            f"choice go by {' and '.join(found.metrics)} as lm-eval computes it from the options' "
            "log-likelihoods, which may differ."
        )
    return found


def _check_rft(plan: TrainingPlan, extractors: Sequence[Extractor]) -> None:
    if len(extractors) > 1:
        raise AFTError("The objective rft takes one task at a time.", "Name one --task.")
    extractor = extractors[0]
    if not extractor.output_type.generates:
        raise AFTError(
            f"rft samples answers, but {plan.task!r} is of type {extractor.output_type.name!r}: it has none "
            "to generate.",
            f"Use {extractor.objective}, or a task of type generate_until.",
        )
    if plan.rft is None:
        raise AFTError("The objective rft lacks its settings.", "Make the plan with TrainingPlan.of.")
    Marker(extractor.task, plan.rft.filter, plan.metric)


# Initialization.


@dataclass
class Initializer:
    """Makes candidates' initial interventions.

    Attributes:
        train: training documents by seed; methods without training are computed from them.
        norms: median norm of the hidden states by layer, for small random vectors.
    """

    prepared: Prepared
    train: Mapping[int, Sequence[TokenizedDocument]]
    norms: Mapping[int, float] = field(default_factory=dict)
    _differences: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, seed: int, noise: int | None = None) -> Intervention:
        """A candidate's initial intervention: it adds nothing yet, or in a retry a small random vector.

        Random parameters are drawn from ``seed``, a retry's vectors from ``noise``.
        """
        model, backbone, method = self.prepared.lm.model, self.prepared.backbone, self.prepared.method
        layers = tuple(self.prepared.layers) if method.steers_all_layers else (layer,)
        generator = torch.Generator().manual_seed(seed)
        tensors = method.initial_tensors(backbone.hidden_size, layers, generator)
        if not method.trained:
            found = self._contrast(seed)
            tensors |= {f"layers.{each}": found[each].clone() for each in layers}
        elif noise is not None:
            for place, each in enumerate(layers):
                tensors[f"layers.{each}"] = small_random(
                    backbone.hidden_size, self.norms[each], noise + place, method
                )
        parameter = next(model.parameters())
        dtype = master_dtype(parameter.dtype)
        placed = {name: tensor.to(parameter.device, dtype) for name, tensor in tensors.items()}
        return Intervention(method, placed, positions=self.prepared.plan.positions)

    def _contrast(self, seed: int) -> dict[int, Tensor]:
        if seed not in self._differences:
            lm = self.prepared.lm
            self._differences[seed] = mean_differences(
                lm.model, self.prepared.backbone, self.train[seed], lm.max_length
            )
        return self._differences[seed]


def small_random(
    width: int, residual_norm: float, seed: int, method: Method = METHODS[DEFAULT_METHOD]
) -> Tensor:
    """A retry's first vector, shape ``(width,)``: normal, with the method's own standard deviation.

    Args:
        residual_norm: median norm of the hidden states at its layer.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator).mul_(method.retry_std(width, residual_norm))


# Vectors without training: the difference between right and wrong answers' hidden states.

TOKENS = 4096  # in one pass


@torch.no_grad()
def mean_differences(
    model: nn.Module, backbone: Backbone, documents: Sequence[TokenizedDocument], window: int
) -> dict[int, Tensor]:
    """For every layer, shape ``(hidden_size,)``, fp32: right options' hidden states minus wrong ones'.

    Contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681), for options of several
    tokens: an option's activation is the mean of the block's output over the option's own tokens, after
    its context; a document's difference is the mean over its right options minus the mean over its
    wrong ones; the vector is the mean over documents. Where a document has one continuation only
    (generation tasks), the next document's serves as the wrong one.

    Args:
        window: most tokens in a row; longer contexts are cut on the left.
    """
    depth = len(backbone.blocks)
    totals = {layer: torch.zeros(backbone.hidden_size, dtype=torch.float64) for layer in range(depth)}
    contrasted = _with_wrong_options(documents)
    rows = [_whole(document, window) for document in contrasted]
    parameter = next(model.parameters())
    for indices in token_budget_batches(rows, False, TOKENS):
        chosen = [rows[i] for i in indices]
        batch = make_batch(chosen, False, parameter.device, parameter.dtype)
        with capture(backbone, range(depth)) as outputs:
            continuation_logits(model, batch)
        weights = _weights(chosen)
        for layer, output in outputs.items():
            hidden = hidden_states(output).float()
            own = (batch.roles == GENERATED).to(hidden.device).unsqueeze(-1)
            means = (hidden * own).sum(1) / own.sum(1)
            totals[layer] += (means.double().cpu() * weights.unsqueeze(1)).sum(0)
    return {layer: (total / len(rows)).float() for layer, total in totals.items()}


def _with_wrong_options(documents: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
    found = []
    for i, document in enumerate(documents):
        if len(document.pairs) == 1:
            context, own = document.pairs[0]
            _, other = documents[(i + 1) % len(documents)].pairs[0]
            document = TokenizedDocument(((context, own), (context, other)), (0,), (1.0, 1.0))
        found.append(document)
    return found


def _whole(document: TokenizedDocument, window: int) -> TokenizedDocument:
    """The document with one more token after each option, so that the options' last tokens are read too."""
    pairs = []
    for context, tail in document.pairs:
        kept = tail[: window - 1]
        pairs.append((context[-(window - len(kept)) :], (*kept, kept[-1])))
    return TokenizedDocument(tuple(pairs), document.gold, document.lengths)


def _weights(documents: Sequence[TokenizedDocument]) -> Tensor:
    """Each option's (row's) weight: in a document right ones sum to 1, wrong ones to -1."""
    weights: list[float] = []
    for document in documents:
        right = set(document.gold)
        n = len(document.pairs)
        wrong = max(1, n - len(right))
        weights += [1 / len(right) if i in right else -1 / wrong for i in range(n)]
    return torch.tensor(weights, dtype=torch.float64)


# The screen: one backward pass at the zero vector ranks the layers.
#
# The gradient with respect to a vector added at a block's output is the gradient with respect to that
# output, summed over positions; one backward pass gives it for all blocks at once.


def check_screen(screen: str, plain: bool = True) -> None:
    """Raise `AFTError` unless ``screen`` is ``off``, ``order`` or a number of layers to keep.

    Args:
        plain: whether one vector is to be added at every position, which is what the screen measures.
    """
    if screen != "off" and not plain:
        raise AFTError("The screen is for static vectors at all positions only.", "Leave out --screen.")
    if screen not in ("off", "order") and not (screen.isdigit() and int(screen) >= 1):
        raise AFTError(f"There is no screen {screen!r}.", "Use off, order, or how many layers to keep.")


def first_gradients(engine: Trajectory, documents: Sequence[TokenizedDocument]) -> dict[int, Tensor]:
    """Gradient of the mean loss at v = 0 for a vector at each block, shape ``(hidden_size,)``, fp32."""
    totals: dict[int, Tensor] = {}
    for batch in engine.batches(documents):
        for layer, gradient in _gradients(engine, batch).items():
            totals[layer] = totals.get(layer, torch.zeros_like(gradient)) + gradient
    return {layer: total / len(documents) for layer, total in totals.items()}


def _gradients(engine: Trajectory, batch: Batch) -> dict[int, Tensor]:
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            hidden = hidden_states(output)
            if not hidden.requires_grad:  # the first block: nothing before it is trained
                hidden = hidden.detach().requires_grad_(True)
            hidden.retain_grad()
            streams[layer] = hidden
            return with_hidden_states(output, hidden)

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(engine.backbone.blocks)]
    try:
        losses = engine.objective.losses(continuation_logits(engine.model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return {
        layer: hidden.grad.float().sum(dim=(0, 1))
        for layer, hidden in streams.items()
        if hidden.grad is not None
    }


def layer_order(gradients: dict[int, Tensor], layers: Sequence[int]) -> list[int]:
    """Layers by the first-order gain of one Adam step, largest first.

    Adam's first step moves every entry by the learning rate against its gradient's sign, so to
    first order the loss falls by the learning rate times the gradient's 1-norm.
    """
    gains = {layer: float(gradients[layer].abs().sum()) for layer in layers}
    return sorted(layers, key=lambda layer: -gains[layer] if math.isfinite(gains[layer]) else math.inf)


def rank_correlation(order: Sequence[int], changes: dict[int, float]) -> float:
    """Spearman's correlation between the screen's order and the sweep's (lower change is better).

    NaN for fewer than three layers.
    """
    shared = [layer for layer in order if layer in changes]
    if len(shared) < 3:
        return float("nan")
    return float(spearmanr(range(len(shared)), [changes[layer] for layer in shared]).statistic)


# Placebo controls: what a vector must beat before its gain means anything.


def check_control(control: str | None, objective: str) -> None:
    """Raise `AFTError` for a control that does not exist or does not fit the objective."""
    if control is None or control == "random":
        return
    fits = [name for name, kind in OBJECTIVES.items() if control in kind.controls]
    if not fits:
        raise AFTError(f"There is no control {control!r}.", f"Choose one of: {', '.join(CONTROLS)}.")
    if objective not in fits:
        raise AFTError(
            f"The control {control!r} is for the objective {fits[0]!r}, this task uses {objective!r}.",
            "Use random, which fits every task.",
        )


def apply_control(examples: Sequence[Example], control: str | None, seed: int) -> list[Example]:
    """The training examples of a control; other controls leave them as they are.

    ``shuffled`` permutes the gold labels across examples (a label beyond an example's options
    wraps around); ``format`` permutes the gold continuations. Each task keeps its own.
    """
    if control not in ("shuffled", "format"):
        return list(examples)
    found = list(examples)
    for task in sorted({example.task for example in examples}):
        places = [i for i, example in enumerate(examples) if example.task == task]
        for i, changed in zip(
            places, _apply_to_group([examples[i] for i in places], control, seed), strict=True
        ):
            found[i] = changed
    return found


def _apply_to_group(examples: Sequence[Example], control: str, seed: int) -> list[Example]:
    if len(examples) < 2:
        return list(examples)
    order = list(range(len(examples)))
    random.Random(f"{control}|{seed}").shuffle(order)
    changed = []
    for place, index in enumerate(order):
        example = examples[index]
        # The neighbour in a random circle: no example keeps its own.
        other = examples[order[(place + 1) % len(order)]]
        if control == "shuffled":
            n = len(example.requests)
            changed.append(replace(example, gold=tuple(sorted({gold % n for gold in other.gold}))))
        else:
            context = example.requests[0][0]
            changed.append(
                replace(example, requests=((context, other.requests[0][1]),), lengths=other.lengths)
            )
    back = dict(zip(order, changed, strict=True))
    return [back[i] for i in range(len(examples))]


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """A vector that adds as much as this one in a random direction, with the same coefficient.

    The direction depends on the vector: placebos of other vectors with this ``seed`` have others. What a
    dynamic method adds keeps its norm at every token, and the tokens it acts on are those it learnt.
    """
    drawn = hashlib.sha256(f"{vector.digest()}|{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(drawn[:7]))
    tensors = METHODS[vector.method].placebo(vector.tensors, generator)
    return replace(
        vector,
        layers={layer: tensors[f"layers.{layer}"] for layer in vector.layers},
        extra={name: tensors[name] for name in vector.extra},
        metadata={**vector.metadata, "control": "random", "control_seed": seed},
    )
