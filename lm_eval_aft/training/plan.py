"""What a training run is asked to do, and the same with model, task and documents in hand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.errors import AFTError
from lm_eval_aft.harness import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.controls import check_control
from lm_eval_aft.training.examples import Extractor, PromptSettings
from lm_eval_aft.training.objectives import Objective, make_objective
from lm_eval_aft.training.protocols import DEFAULT, Protocol, Stage, find_protocol, parse_layers, schedule
from lm_eval_aft.training.screen import check_screen
from lm_eval_aft.training.solutions import Marker
from lm_eval_aft.training.splits import Splits, split_task


@dataclass(frozen=True)
class RFTSettings:
    """The numbers of rejection-sampling fine-tuning, see `lm_eval_aft.training.rft`.

    Attributes:
        samples: solutions sampled per problem and round.
        rounds: the most rounds.
        temperature: of sampling; everything else about it is the task's and the model's.
        filter: the task's filter whose marks count; ``None``: its first.
    """

    samples: int = 8
    rounds: int = 3
    temperature: float = 0.7
    filter: str | None = None

    def __post_init__(self) -> None:
        fine = {"samples": self.samples >= 1, "rounds": self.rounds >= 1}
        fine["temperature"] = 0 < self.temperature < math.inf
        for name, good in fine.items():
            if not good:
                raise AFTError(f"rft_{name}={getattr(self, name)} makes no sense.", "Give a positive number.")


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what a training run does; two equal plans give equal vectors.

    ``train_docs`` and ``selection_docs`` are exact numbers; left open, they are as many as the
    protocol wants and the task has. ``rft`` is there if and only if that is the objective.
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
    control: str | None = None
    screen: str = "off"
    include_path: tuple[str, ...] = ()
    rft: RFTSettings | None = None

    def seeds(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.protocol.seeds)

    @classmethod
    def of(cls, task: str, protocol: str | Protocol = DEFAULT, **settings: Any) -> TrainingPlan:
        """A plan from a protocol's name, changes to the protocol, and fields of the plan.

        Fields of `RFTSettings` are given as ``rft_samples``, ``rft_rounds`` and so on.

        Raises:
            AFTError: an unknown protocol, or an unknown or impossible setting.
        """
        base = find_protocol(protocol) if isinstance(protocol, str) else protocol
        own = {each.name for each in fields(cls)}
        rounds = {f"rft_{each.name}": each.name for each in fields(RFTSettings)}
        given = {rounds[name]: value for name, value in settings.items() if name in rounds}
        wanted = {name: value for name, value in given.items() if value is not None}
        changes = {name: value for name, value in settings.items() if name not in {*own, *rounds}}
        plain = {name: value for name, value in settings.items() if name in own}
        if settings.get("objective") == "rft":
            plain["rft"] = RFTSettings(**wanted)
        elif wanted:
            raise AFTError(
                f"rft_{next(iter(wanted))} is a setting of the objective rft.", "Add --objective rft."
            )
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
        return schedule(self.plan.protocol, len(self.layers), self.splits.drawn, len(self.splits.selection))

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
            "control": self.plan.control or "none",
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
        }


def _rounds(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    if plan.rft is None:
        return {}
    marker = Marker(prepared.splits.extractor.task, plan.rft.filter, plan.metric)
    return {**asdict(plan.rft), "filter": marker.filter, "marked by": marker.metric}


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
    if objective_name == "rft":
        _check_rft(plan, extractor)
    elif objective_name != extractor.objective:
        raise AFTError(
            f"The objective {objective_name!r} does not fit {plan.task!r}.", f"Use {extractor.objective}."
        )
    check_control(plan.control, objective_name)
    objective = make_objective(objective_name, plan.metric, list(task.aggregation()))
    most = (plan.protocol.train_docs, plan.protocol.selection_docs)
    splits = split_task(extractor, plan.train_docs, plan.selection_docs, plan.train_split, most)
    return Prepared(plan, lm, backbone, objective, splits, layers)


def _check_rft(plan: TrainingPlan, extractor: Extractor) -> None:
    kind = extractor.task.OUTPUT_TYPE
    if kind != "generate_until":
        raise AFTError(
            f"rft samples answers, but {plan.task!r} is of type {kind!r}: it has none to generate.",
            f"Use {extractor.objective}, or a task of type generate_until.",
        )
    if plan.rft is None:
        raise AFTError("The objective rft lacks its settings.", "Make the plan with TrainingPlan.of.")
    Marker(extractor.task, plan.rft.filter, plan.metric)
