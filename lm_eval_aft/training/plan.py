"""What a training run is asked to do, and the same with model, task and documents in hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lm_eval_aft.backbone import Backbone, find_backbone
from lm_eval_aft.errors import AFTError
from lm_eval_aft.harness import load_task
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.controls import check_control
from lm_eval_aft.training.examples import Extractor, PromptSettings
from lm_eval_aft.training.fit import Candidate, Recipe
from lm_eval_aft.training.objectives import Objective, make_objective
from lm_eval_aft.training.splits import Splits, split_task
from lm_eval_aft.training.sweep import parse_layers
from lm_eval_aft.training.trajectory import new_vector


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what a training run does; two equal plans give equal vectors."""

    task: str
    layers: str = "all"
    seeds: int = 3
    first_seed: int = 0
    train_docs: int | None = None
    selection_docs: int | None = None
    train_split: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    objective: str | None = None
    metric: str | None = None
    control: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    include_path: tuple[str, ...] = ()

    def seed_range(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ledgers and headers."""
        return asdict(self)


@dataclass
class Prepared:
    """A plan with its model, task and documents in hand, before any training."""

    plan: TrainingPlan
    lm: AFTLM
    backbone: Backbone
    objective: Objective
    splits: Splits
    layers: list[int]

    def candidates(self) -> list[Candidate]:
        """One candidate per layer and seed, at zero."""
        return [
            Candidate(layer, seed, self.plan.recipe, new_vector(self.lm.model, self.backbone))
            for seed in self.plan.seed_range()
            for layer in self.layers
        ]

    def summary(self) -> dict[str, Any]:
        """What a dry run prints."""
        return {
            "model": str(self.lm.pretrained),
            "task": self.plan.task,
            "num_fewshot": self.splits.extractor.num_fewshot,
            "objective": self.objective.name,
            "metric": self.objective.metric,
            "control": self.plan.control or "none",
            "layers": self.layers,
            "seeds": self.plan.seeds,
            "candidates": len(self.layers) * self.plan.seeds,
            "train documents": self.splits.train_docs,
            **{f"documents: {key}": value for key, value in self.splits.counts.items()},
            **self.plan.recipe.to_dict(),
        }


def prepare(lm: AFTLM, plan: TrainingPlan) -> Prepared:
    """Check a plan against its model and task, and build the documents it needs.

    Raises:
        AFTError: anything the plan asks for that cannot be.
    """
    if plan.seeds < 1:
        raise AFTError(f"seeds={plan.seeds} makes no sense.", "Give at least 1.")
    backbone = find_backbone(lm.model)
    layers = parse_layers(plan.layers, len(backbone.blocks))
    task = load_task(plan.task, plan.include_path)
    extractor = Extractor(task, lm, plan.prompts)
    objective_name = plan.objective or extractor.objective
    if objective_name != extractor.objective:
        raise AFTError(
            f"The objective {objective_name!r} does not fit {plan.task!r}.", f"Use {extractor.objective}."
        )
    check_control(plan.control, objective_name)
    objective = make_objective(objective_name, plan.metric, list(task.aggregation()))
    splits = split_task(extractor, plan.train_docs, plan.selection_docs, plan.train_split)
    return Prepared(plan, lm, backbone, objective, splits, layers)
