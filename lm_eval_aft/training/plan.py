"""What a training run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.field_types import check_field_types
from lm_eval_aft.methods import DEFAULT as DEFAULT_METHOD
from lm_eval_aft.methods import find_method
from lm_eval_aft.positions import POSITIONS
from lm_eval_aft.training.controls import CONTROLS
from lm_eval_aft.training.examples import PromptSettings
from lm_eval_aft.training.protocols import DEFAULT, Protocol, find_protocol


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
        check_field_types(self)
        fine = {"samples": self.samples >= 1, "rounds": self.rounds >= 1}
        fine["temperature"] = 0 < self.temperature < math.inf
        for name, good in fine.items():
            if not good:
                raise AFTError(f"rft_{name}={getattr(self, name)} makes no sense.", "Give a positive number.")


_KNOWN = {
    "objective": ("choice", "lm", "rft"),
    "choice_loss": ("cross-entropy", "margin"),
    "control": CONTROLS,
    "positions": tuple(POSITIONS),
}


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides what a training run does; two equal plans give equal vectors.

    ``train_docs`` and ``selection_docs`` are exact numbers; left open, they are as many as the
    protocol wants and the task has. ``task`` may name several, comma-separated: they are mixed evenly
    (`lm_eval_aft.training.mixed_splits`), and the numbers are totals. ``choice_loss``, ``margin`` and
    ``label_smoothing`` are those of `lm_eval_aft.training.choice_loss`. ``calibrate`` chooses the finished
    vector's coefficient on the selection split; ``norm_cap`` bounds its norm, as a share of the median
    residual norm at its layer. ``rft`` is there if and only if that is the objective.
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
    method: str = DEFAULT_METHOD
    positions: str = "all"
    calibrate: bool = False
    norm_cap: float | None = None
    screen: str = "off"
    include_path: tuple[str, ...] = ()
    rft: RFTSettings | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise AFTError(f"There is no {name} {value!r}.", f"Choose one of: {', '.join(known)}.")

    def seeds(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.protocol.seeds)

    @property
    def tasks(self) -> list[str]:
        """The tasks one by one."""
        return [name.strip() for name in self.task.split(",")]

    @classmethod
    def of(
        cls, task: str | Sequence[str], protocol: str | Protocol = DEFAULT, **settings: Any
    ) -> TrainingPlan:
        """A plan from a protocol's name, changes to the protocol, and fields of the plan.

        Fields of `RFTSettings` are given as ``rft_samples``, ``rft_rounds`` and so on.

        Raises:
            AFTError: an unknown protocol, an unknown or impossible setting, or a task named twice.
        """
        task = task if isinstance(task, str) else ",".join(task)
        names = [name.strip() for name in task.split(",")]
        if len(set(names)) < len(names) or not all(names):
            raise AFTError(f"The tasks {task!r} name one twice, or none.", "Name each task once.")
        base = protocol if isinstance(protocol, Protocol) else find_protocol(str(protocol))
        own = {each.name for each in fields(cls)}
        rounds = {f"rft_{each.name}": each.name for each in fields(RFTSettings)}
        given = {rounds[name]: value for name, value in settings.items() if name in rounds}
        wanted = {name: value for name, value in given.items() if value is not None}
        changes = {name: value for name, value in settings.items() if name not in {*own, *rounds}}
        plain = {name: value for name, value in settings.items() if name in own}
        chosen = base.changed(changes)
        if not find_method(plain.get("method", DEFAULT_METHOD)).trained:
            chosen = chosen.without_training()
        if settings.get("objective") == "rft":
            plain["rft"] = RFTSettings(**wanted)
        elif wanted:
            raise AFTError(
                f"rft_{next(iter(wanted))} is a setting of the objective rft.", "Add --objective rft."
            )
        return cls(",".join(names), chosen, **plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ledgers and headers."""
        return {**asdict(self), "protocol": self.protocol.to_dict()}
