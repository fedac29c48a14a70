"""The cells of a study, each with the address of everything its result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from lm_eval_aft.bench.study import BenchStudy, MethodEntry, ModelEntry, TaskEntry
from lm_eval_aft.errors import AFTError
from lm_eval_aft.identity import digest, model_identity, task_identity
from lm_eval_aft.training.plan import TrainingPlan

# Part of every address: to be raised when the same settings no longer mean the same result.
FORMAT = "aft-bench/1"


@dataclass(frozen=True)
class Cell:
    """One model, task, method and seed.

    Attributes:
        vector_key: address of the vector: model, task and training plan.
        baseline_key: address of the baseline's scores: model, task, prompts and limit.
        key: address of the cell's result: both of these, and the number of placebos.
    """

    model: ModelEntry
    task: TaskEntry
    method: MethodEntry
    seed: int
    plan: TrainingPlan
    placebos: int
    vector_key: str
    baseline_key: str
    key: str

    @property
    def name(self) -> str:
        """What it is called, and what ``--only`` looks at."""
        return f"{self.model.name}/{self.task.name}/{self.method.name}/seed-{self.seed}"

    @property
    def series(self) -> tuple[str, str, str]:
        """What its sisters of other seeds share with it."""
        return (self.model.name, self.task.name, self.method.name)

    @property
    def control(self) -> bool:
        """Whether it is a placebo by design, which no verdict is asked of."""
        return self.plan.control is not None

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether its name, or one part of it, fits one of the patterns; without patterns, yes."""
        texts = [self.name, *self.name.split("/")]
        return not patterns or any(fnmatchcase(text, pattern) for pattern in patterns for text in texts)


def build_cells(study: BenchStudy) -> list[Cell]:
    """Every cell of the study, model by model, task by task.

    To be called in the study's ``data`` folder: what lies there belongs to the tasks' identities.

    Raises:
        AFTError: a task that the harness does not have.
    """
    models = {entry.name: model_identity(entry.pretrained, entry.model_args) for entry in study.models}
    tasks = {entry.name: task_identity(entry.task, study.include_path) for entry in study.tasks}
    _require_known(study, [entry.task for entry in study.tasks if "config" not in tasks[entry.name]])
    cells = []
    for model in study.models:
        for task in study.tasks:
            for method in study.methods:
                for seed in study.seeds:
                    plan = study.plan(model, task, method, seed)
                    made = {key: value for key, value in plan.to_dict().items() if key != "include_path"}
                    about = [FORMAT, models[model.name], tasks[task.name]]
                    vector_key = digest([*about, made])
                    baseline_key = digest([*about, task.limit, asdict(plan.prompts)])
                    key = digest([vector_key, baseline_key, study.placebos])
                    own = (model, task, method, seed, plan, study.placebos)
                    cells.append(Cell(*own, vector_key, baseline_key, key))
    return cells


def _require_known(study: BenchStudy, unknown: list[str]) -> None:
    if not unknown:
        return
    from lm_eval_aft.harness import check_names, full_index

    check_names(unknown, full_index(study.include_path))  # tells the nearest names
    raise AFTError(
        f"{', '.join(unknown)}: a group of tasks, or one without a file of its own.",
        "A cell is trained and scored on one plain task: name its members one by one.",
    )
