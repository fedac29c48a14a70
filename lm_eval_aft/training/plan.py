"""What a training run is asked to do, and the same with model, task and documents in hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.errors import AFTError
from lm_eval_aft.harness import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.controls import check_control
from lm_eval_aft.training.examples import Extractor, PromptSettings
from lm_eval_aft.training.objectives import Choice, Objective, make_objective
from lm_eval_aft.training.protocols import DEFAULT, Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.screen import check_screen
from lm_eval_aft.training.splits import Splits, split_task


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what a training run does; two equal plans give equal vectors.

    ``train_docs`` and ``selection_docs`` are exact numbers; left open, they are as many as the
    protocol wants and the task has. ``choice_loss``, ``margin`` and ``label_smoothing`` are those of
    `lm_eval_aft.training.choice_loss`.
    """

    task: str
    protocol: Protocol = field(default_factory=lambda: find_protocol(DEFAULT))
    first_seed: int = 0
    train_docs: int | None = None
    selection_docs: int | None = None
    train_split: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    objective: str | None = None
    metric: str | None = None
    choice_loss: str | None = None
    margin: float | None = None
    label_smoothing: float | None = None
    control: str | None = None
    screen: str = "off"
    include_path: tuple[str, ...] = ()

    def seeds(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.protocol.seeds)

    @classmethod
    def of(cls, task: str, protocol: str | Protocol = DEFAULT, **settings: Any) -> TrainingPlan:
        """A plan from a protocol's name, changes to the protocol, and fields of the plan.

        Raises:
            AFTError: an unknown protocol, or an unknown or impossible setting.
        """
        base = find_protocol(protocol) if isinstance(protocol, str) else protocol
        own = {each.name for each in fields(cls)}
        changes = {name: value for name, value in settings.items() if name not in own}
        plain = {name: value for name, value in settings.items() if name in own}
        return cls(task, base.changed(changes), **plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ledgers and headers."""
        return {**asdict(self), "protocol": self.protocol.to_dict()}


@dataclass
class Prepared:
    """A plan with its model, task and documents in hand, before any training."""

    plan: TrainingPlan
    lm: AFTLM
    backbone: Backbone
    objective: Objective
    splits: Splits
    layers: list[int]

    def stages(self) -> list[Stage]:
        """What will be trained, before any retry."""
        drawn = min(self.splits.train_docs, len(self.splits.pool))
        return schedule(self.plan.protocol, len(self.layers), drawn, len(self.splits.selection))

    def summary(self) -> dict[str, Any]:
        """What a dry run prints, name by name."""
        protocol = self.plan.protocol.to_dict()
        return {
            "model": str(self.lm.pretrained),
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "task": self.plan.task,
            "num_fewshot": self.splits.extractor.num_fewshot,
            "objective": self.objective.name,
            "metric": self.objective.metric,
            **({"loss": str(self.objective.loss)} if isinstance(self.objective, Choice) else {}),
            "control": self.plan.control or "none",
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
        }


def _listed(value: Any) -> Any:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else value


def prepare(lm: AFTLM, plan: TrainingPlan) -> Prepared:
    """Check a plan against its model and task, and build the documents it needs.

    Raises:
        AFTError: anything the plan asks for that cannot be.
    """
    backbone = find_backbone(lm.model)
    layers = parse_layers(plan.protocol.layers, len(backbone.blocks))
    check_screen(plan.screen)
    task = load_task(plan.task, plan.include_path)
    extractor = Extractor(task, lm, plan.prompts)
    objective_name = plan.objective or extractor.objective
    if objective_name != extractor.objective:
        raise AFTError(
            f"The objective {objective_name!r} does not fit {plan.task!r}.", f"Use {extractor.objective}."
        )
    check_control(plan.control, objective_name)
    objective = make_objective(
        objective_name,
        plan.metric,
        list(task.aggregation()),
        choice_loss=plan.choice_loss,
        margin=plan.margin,
        label_smoothing=plan.label_smoothing,
    )
    most = (plan.protocol.train_docs, plan.protocol.selection_docs)
    splits = split_task(extractor, plan.train_docs, plan.selection_docs, plan.train_split, most)
    return Prepared(plan, lm, backbone, objective, splits, layers)
