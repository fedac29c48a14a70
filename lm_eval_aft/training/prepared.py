"""A training plan with its model, tasks and documents in hand, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.errors import AFTError
from lm_eval_aft.harness import compiled_once, load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.methods import DEFAULT as DEFAULT_METHOD
from lm_eval_aft.methods import Method, find_method
from lm_eval_aft.training.controls import check_control
from lm_eval_aft.training.examples import Extractor
from lm_eval_aft.training.mixed_splits import MixedSplits, split_tasks
from lm_eval_aft.training.mixture import Mixture
from lm_eval_aft.training.objectives import Objective, loss_of, make_objective
from lm_eval_aft.training.plan import TrainingPlan
from lm_eval_aft.training.protocols import Stage, parse_layers, schedule
from lm_eval_aft.training.screen import check_screen
from lm_eval_aft.training.solutions import Marker
from lm_eval_aft.training.splits import Splits, split_task


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
    """A plan with its model, tasks and documents in hand, before any training.

    Attributes:
        objective, splits: the task's own; of several tasks, a mixture of ``parts``.
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
        """The layers that candidates are told apart by: one, where a method steers all at once."""
        return self.layers[:1] if self.method.together else self.layers

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
            "task": self.plan.task,
            "num_fewshot": ", ".join(dict.fromkeys(str(part.num_fewshot) for part in self.parts)),
            "objective": self.objective.name,
            "metric": self.objective.metric,
            **({"loss": str(loss)} if (loss := loss_of(self.objective)) else {}),
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
                for key, v in protocol.items()
            },
            "layers": _listed(self.layers),
            "train_docs": self.splits.train_docs,
            "selection_docs": len(self.splits.selection),
            **{f"documents: {key}": value for key, value in self.splits.counts.items()},
            **(self._by_task() if len(self.parts) > 1 else {}),
        }

    def _by_task(self) -> dict[str, str]:
        return {
            f"task {part.name}": f"{part.splits.drawn} train, {len(part.splits.selection)} selection, "
            f"{part.num_fewshot}-shot, {part.objective.metric}"
            for part in self.parts
        }


def _rounds(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    if plan.rft is None:
        return {}
    marker = Marker(prepared.parts[0].splits.extractor.task, plan.rft.filter, plan.metric)
    return {**asdict(plan.rft), "filter": marker.filter, "marked by": marker.metric}


def _listed(value: Any) -> Any:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else value


Documents = tuple[list[Extractor], Splits | MixedSplits]


def prepare(lm: AFTLM, plan: TrainingPlan, kept: dict[Any, Documents] | None = None) -> Prepared:
    """Check a plan against its model and task, and build the documents it needs.

    Args:
        kept: documents of earlier plans for this model; plans that differ in their recipe only share them.

    Raises:
        AFTError: anything the plan asks for that cannot be.
    """
    backbone = find_backbone(lm.model)
    layers = parse_layers(plan.protocol.layers, len(backbone.blocks))
    _check_intervention(plan)
    most = (plan.protocol.train_docs, plan.protocol.selection_docs)
    wanted = (plan.train_docs, plan.selection_docs, plan.train_split, most, plan.protocol.share_fewshot)
    asked = (plan.task, plan.prompts, plan.include_path, *wanted)
    known = None if kept is None else kept.get(asked)
    extractors = known[0] if known else _extractors(lm, plan)
    name = _objective_name(plan, extractors)
    check_control(plan.control, name)
    objectives = [_objective(plan, name, extractor) for extractor in extractors]
    with compiled_once():
        splits = known[1] if known else _split(extractors, plan.tasks, wanted)
    if kept is not None:
        kept[asked] = (extractors, splits)
    several = isinstance(splits, MixedSplits)
    objective = Mixture(objectives, plan.tasks) if several else objectives[0]
    own = splits.parts if isinstance(splits, MixedSplits) else [splits]
    parts = [TaskPart(*each) for each in zip(plan.tasks, objectives, own, strict=True)]
    return Prepared(plan, lm, backbone, objective, splits, layers, parts)


def _extractors(lm: AFTLM, plan: TrainingPlan) -> list[Extractor]:
    return [Extractor(load_task(name, plan.include_path), lm, plan.prompts) for name in plan.tasks]


def _split(extractors: list[Extractor], tasks: list[str], wanted: Any) -> Splits | MixedSplits:
    if len(extractors) == 1:
        return split_task(extractors[0], *wanted)
    return split_tasks(extractors, tasks, *wanted)


def _check_intervention(plan: TrainingPlan) -> None:
    method = find_method(plan.method)
    if plan.norm_cap is not None and not (plan.norm_cap > 0 and method.constant):
        raise AFTError(
            f"A norm cap of {plan.norm_cap:g} does not fit the method {plan.method!r}.",
            "It is a positive share of the residual norm, for methods that add the same everywhere.",
        )
    check_screen(plan.screen, plain=plan.method == DEFAULT_METHOD and plan.positions == "all")


def _objective_name(plan: TrainingPlan, extractors: Sequence[Extractor]) -> str:
    """The objective asked for, or that of all tasks' types; each task must allow it."""
    own = {name: extractor.objective for name, extractor in zip(plan.tasks, extractors, strict=True)}
    wanted = plan.objective or extractors[0].objective
    if len(set(own.values())) > 1:
        told = ", ".join(f"{name} {objective!r}" for name, objective in own.items())
        raise AFTError(
            f"These tasks have different objectives: {told}.",
            "A vector is trained with one: choose tasks of one type.",
        )
    if wanted == "rft":
        _check_rft(plan, extractors)
    elif wanted != extractors[0].objective:
        raise AFTError(f"The objective {wanted!r} does not fit {plan.task!r}.", f"Use {own[plan.tasks[0]]}.")
    return wanted


def _objective(plan: TrainingPlan, name: str, extractor: Extractor) -> Objective:
    return make_objective(
        name,
        plan.metric,
        list(extractor.task.aggregation()),
        choice_loss=plan.choice_loss,
        margin=plan.margin,
        label_smoothing=plan.label_smoothing,
    )


def _check_rft(plan: TrainingPlan, extractors: Sequence[Extractor]) -> None:
    if len(extractors) > 1:
        raise AFTError("The objective rft takes one task at a time.", "Name one --task.")
    extractor = extractors[0]
    kind = extractor.task.OUTPUT_TYPE
    if kind != "generate_until":
        raise AFTError(
            f"rft samples answers, but {plan.task!r} is of type {kind!r}: it has none to generate.",
            f"Use {extractor.objective}, or a task of type generate_until.",
        )
    if plan.rft is None:
        raise AFTError("The objective rft lacks its settings.", "Make the plan with TrainingPlan.of.")
    Marker(extractor.task, plan.rft.filter, plan.metric)
