"""What a training run is asked to do, and the named recipes it may follow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lm_eval_aft._util.config import check_field_types
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.harness.examples import PromptSettings
from lm_eval_aft.steering.intervention import POSITIONS
from lm_eval_aft.steering.methods import DEFAULT_METHOD, find_method
from lm_eval_aft.training.controls import CONTROLS

SMALLEST_SHARE = 8  # documents below which a share of them says nothing


@dataclass(frozen=True)
class Rung:
    """One round of successive halving.

    Attributes:
        train: share of the training documents seen in each epoch of this rung.
        selection: share of the selection documents the rung is judged on.
        epochs: passes over those documents.
        keep: share of the rung's candidates that go on.
    """

    train: float
    selection: float
    epochs: int
    keep: float

    def __post_init__(self) -> None:
        shares = (self.train, self.selection, self.keep)
        if not all(0 < share <= 1 for share in shares) or self.epochs < 1:
            raise AFTError(f"The rung {self} makes no sense.", "Shares lie in (0, 1], epochs are at least 1.")

    def __str__(self) -> str:
        return f"{self.train:g}:{self.selection:g}:{self.epochs}:{self.keep:g}"


@dataclass(frozen=True)
class Protocol:
    """Every number of a training recipe.

    A run has up to three stages. *Search*: every layer with every learning rate, on the first
    seed and with the first ``l2``, thinned out rung by rung; the best ``finalists`` go on.
    *Penalty*: those with every ``l2``, one epoch each, where there are several. *Final*: the best
    ``finalists`` with every seed, from zero, to the end. Without rungs there is only the final
    stage, over everything.

    Attributes:
        name: what it is called; settings that were changed afterwards are in the fields.
        layers: see `parse_layers`.
        train_docs: most training documents, where the user names no number.
        selection_docs: most selection documents, likewise.
        epochs: the most epochs of a finalist.
        min_epochs: epochs before ``patience`` may stop it.
        patience: epochs without a better selection score after which it stops; ``None``: never.
        seeds: how many seeds each finalist is trained with.
        lr: learning rates of Adam, in residual-stream units a step.
        l2: values of lambda in the penalty lambda * ||v||^2.
        clip: gradient norm above which gradients are scaled down; ``None``: never.
        batch_size: documents per optimiser step.
        share_fewshot: documents whose prompts show the same few-shot examples, where they show any. Such
            documents share a row, whose common part is computed once, and an optimiser step.
        rungs: the rounds of the search; none: no search.
        finalists: how many (layer, lr, l2) reach the final stage; not used without rungs.
        regression: stop a finalist whose selection score falls behind the baseline's.
        retries: how often to start again from a small random vector when the best finalist is no
            better than the baseline; from the second time on at the next-best layer.
    """

    name: str
    layers: str = "all"
    train_docs: int = 500
    selection_docs: int = 500
    epochs: int = 10
    min_epochs: int = 1
    patience: int | None = 3
    seeds: int = 3
    lr: tuple[float, ...] = (1e-3,)
    l2: tuple[float, ...] = (0.0,)
    clip: float | None = 1.0
    batch_size: int = 1
    share_fewshot: int = 1
    rungs: tuple[Rung, ...] = ()
    finalists: int = 1
    regression: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        check_field_types(self)
        fine = {name: getattr(self, name) >= 1 for name in ("epochs", "min_epochs", "seeds", "batch_size")}
        counts = ("train_docs", "selection_docs", "finalists", "share_fewshot")
        fine |= {name: getattr(self, name) >= 1 for name in counts}
        fine["lr"] = bool(self.lr) and all(0 < lr < math.inf for lr in self.lr)
        fine["l2"] = bool(self.l2) and all(0 <= l2 < math.inf for l2 in self.l2)
        fine["clip"] = self.clip is None or self.clip > 0
        fine["patience"] = self.patience is None or self.patience >= 1
        fine["retries"] = self.retries >= 0
        for name, good in fine.items():
            if not good:
                value = getattr(self, name)
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise AFTError(f"{name}={shown} makes no sense.", "Give a positive number.")

    def changed(self, changes: Mapping[str, Any]) -> Protocol:
        """This protocol with some fields replaced; entries of ``None`` are left as they are.

        ``patience`` or ``clip`` of 0 switches them off; ``lr`` and ``l2`` may be single numbers.

        Raises:
            AFTError: an unknown field or an impossible value.
        """
        known = {field.name for field in fields(self)}
        wanted: dict[str, Any] = {}
        for name, value in changes.items():
            if name not in known:
                raise AFTError(f"A protocol has no setting {name!r}.", f"It has: {', '.join(sorted(known))}.")
            if value is None:
                continue
            if name in ("patience", "clip") and not value:
                value = None
            if isinstance(value, bool) and name != "regression":
                raise AFTError(f"{name}={value} makes no sense.", "Give a number.")
            if name in ("lr", "l2"):
                value = (float(value),) if isinstance(value, int | float) else tuple(value)
            wanted[name] = value
        return replace(self, **wanted)

    def without_training(self) -> Protocol:
        """This protocol for methods that are computed: every layer is judged once."""
        once = replace(self, epochs=1, min_epochs=1, patience=None, rungs=(), retries=0)
        return replace(once, lr=self.lr[:1], l2=(0.0,), regression=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ledgers and headers."""
        values = {**asdict(self), "rungs": [str(rung) for rung in self.rungs]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Stage:
    """Candidates that go through the same epochs together.

    Attributes:
        name: ``search``, ``penalty`` or ``final``.
        candidates: how many there are.
        train, selection: documents seen, and judged on, in each epoch.
        epochs: how many (the most, in the final stage).
        keep: how many of them go on afterwards.
    """

    name: str
    candidates: int
    train: int
    selection: int
    epochs: int
    keep: int

    @property
    def documents(self) -> int:
        """Candidate-documents, trained on and judged on, at most."""
        return self.candidates * self.epochs * (self.train + self.selection)


def schedule(protocol: Protocol, layers: int, train: int, selection: int) -> list[Stage]:
    """What a protocol does with so many layers and documents, before any retry."""
    stages = []
    settings = layers * len(protocol.lr)
    for place, rung in enumerate(protocol.rungs, start=1):
        keep = min(settings, protocol.finalists)
        if place < len(protocol.rungs):  # always enough for the final stage
            keep = max(keep, math.ceil(settings * rung.keep))
        seen = (_share(train, rung.train), _share(selection, rung.selection))
        stages.append(Stage("search", settings, *seen, rung.epochs, keep))
        settings = keep
    if protocol.rungs and len(protocol.l2) > 1:
        keep = min(settings, protocol.finalists)
        stages.append(Stage("penalty", settings * len(protocol.l2), train, selection, 1, keep))
        settings = keep
    elif not protocol.rungs:
        settings *= len(protocol.l2)
    final = settings * protocol.seeds
    return [*stages, Stage("final", final, train, selection, protocol.epochs, 1)]


def _share(documents: int, part: float) -> int:
    return min(documents, max(SMALLEST_SHARE, math.ceil(documents * part)))


_LEARNING_RATES = (1e-4, 5e-4, 1e-3, 2e-3, 1e-2)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("rapid", "25%-75%:2", train_docs=50, epochs=3, patience=None, seeds=1, clip=None),
        Protocol("optimized", "20%-80%", train_docs=100, seeds=1, rungs=(Rung(1, 1, 3, 1),)),
        Protocol("maximum", train_docs=100, l2=(1e-3,), regression=True, retries=3),
        Protocol(
            "adaptive",
            min_epochs=3,
            share_fewshot=8,
            lr=_LEARNING_RATES,
            l2=(0.0, 1e-4, 1e-3, 1e-2),
            rungs=(Rung(1 / 8, 1 / 4, 1, 1 / 3), Rung(1 / 4, 1 / 2, 1, 1 / 3), Rung(1, 1, 1, 1 / 2)),
            finalists=2,
            retries=3,
        ),
        Protocol("full", train_docs=400, lr=_LEARNING_RATES, l2=(1e-3,)),
    )
}
DEFAULT_PROTOCOL = "adaptive"


def find_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        AFTError: there is none.
    """
    if name not in PROTOCOLS:
        raise AFTError(f"There is no protocol {name!r}.", f"Choose one of: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def parse_rungs(text: str) -> tuple[Rung, ...]:
    """Rungs written ``TRAIN:SELECTION:EPOCHS:KEEP``, comma-separated; ``none``: no search.

    Raises:
        AFTError: unreadable.
    """
    if text.strip().lower() == "none":
        return ()
    rungs = []
    for part in text.split(","):
        try:
            train, selection, epochs, keep = part.split(":")
            rungs.append(Rung(float(train), float(selection), int(epochs), float(keep)))
        except ValueError as error:
            raise AFTError(
                f"Cannot read the rung {part.strip()!r}.",
                "Write TRAIN:SELECTION:EPOCHS:KEEP, for example 0.125:0.25:1:0.33, or none.",
            ) from error
    return tuple(rungs)


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers.

    Raises:
        AFTError: unreadable.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise AFTError(f"Cannot read the numbers {text!r}.", "Examples: 1e-3, or 1e-4,1e-3,1e-2.") from error


def parse_layers(text: str, depth: int) -> list[int]:
    """Layers named by ``all``, indices, ranges and depth percentages: ``3,5-8,25%-75%:2``.

    A range includes both ends; ``:N`` after it takes every Nth layer. Percentages are of the
    depth, 0 % being the first block and 100 % the last.

    Raises:
        AFTError: unreadable, or out of range.
    """
    if text.strip().lower() == "all":
        return list(range(depth))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+%?)(?:\s*-\s*(\d+%?))?(?::(\d+))?\s*", part)
        if not match:
            raise AFTError(f"Cannot read layers {part.strip()!r}.", "Examples: all, 3, 2,5, 4-8, 25%-75%:2.")
        first = _layer(match[1], depth)
        last = _layer(match[2], depth) if match[2] else first
        step = int(match[3] or 1)
        if last < first or step < 1:
            raise AFTError(f"Layers {part.strip()!r} are empty.", "Write the smaller end first.")
        if last >= depth:
            raise AFTError(f"Layer {last} is out of range: this model has blocks 0 to {depth - 1}.")
        found.update(range(first, last + 1, step))
    return sorted(found)


def _layer(text: str, depth: int) -> int:
    if text.endswith("%"):
        percent = int(text[:-1])
        if percent > 100:
            raise AFTError(f"Depth {text} is beyond the last layer.", "Use 0% to 100%.")
        return round(percent / 100 * (depth - 1))
    return int(text)


# What a training run is asked to do.


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
    (`lm_eval_aft.harness.splits`), and the numbers are totals. ``choice_loss``, ``margin`` and
    ``label_smoothing`` are those of `lm_eval_aft.training.objectives`. ``calibrate`` chooses the finished
    vector's coefficient on the selection split; ``norm_cap`` bounds its norm, as a share of the median
    residual norm at its layer. ``rft`` is there if and only if that is the objective.
    """

    task: str
    protocol: Protocol = field(default_factory=lambda: find_protocol(DEFAULT_PROTOCOL))
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
        cls, task: str | Sequence[str], protocol: str | Protocol = DEFAULT_PROTOCOL, **settings: Any
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
