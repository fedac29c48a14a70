"""The settings of a training run, and the named recipes (protocols)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.settings import Count, NotNegative, Number, Positive, Share, settings
from lm_eval_aft.harness.examples import PromptSettings
from lm_eval_aft.steering.intervention import POSITIONS
from lm_eval_aft.steering.methods import DEFAULT_METHOD, find_method
from lm_eval_aft.training.candidate import Relative, read_rate
from lm_eval_aft.training.objectives import CHOICE_LOSSES, CONTROLS, OBJECTIVES
from lm_eval_aft.training.selection import CRITERIA, DEFAULT_CRITERION

LINE_SEARCH = 4  # the most lengths tried in a line search
KEPT_BYTES = 2 << 30  # bytes of frozen blocks' outputs kept for trials to come
SMALLEST_SHARE = 8  # fewer documents are too few for any comparison


def _one_of(known: Iterable[str]) -> AfterValidator:
    def check(value: str, info: ValidationInfo) -> str:
        if value not in known:
            raise AFTError(f"There is no {info.field_name} {value!r}.", f"Choose one of: {', '.join(known)}.")
        return value

    return AfterValidator(check)


def _paths(given: Any) -> Any:
    """One folder or several, as text."""
    folders = (given,) if isinstance(given, str | os.PathLike) else given
    return tuple(map(str, folders)) if isinstance(folders, list | tuple) else folders


@settings
class Rung:
    """One round of successive halving.

    Attributes:
        train: share of the training documents seen in each epoch of this rung.
        selection: share of the selection documents the rung is judged on.
        epochs: passes over those documents.
        keep: share of the rung's candidates that go on.
    """

    train: Share
    selection: Share
    epochs: Count
    keep: Share

    def __str__(self) -> str:
        return f"{self.train:g}:{self.selection:g}:{self.epochs}:{self.keep:g}"


# The settings of protocols with an optimiser, and of those with one backward pass.
_OPTIMISER = ("epochs", "min_epochs", "patience", "lr", "l2", "clip", "batch_size", "regression", "retries")
_ONE_PASS = ("lengths", "refine")


@settings
class Protocol:
    """Every number of a training recipe.

    A run has up to three stages. *Search*: every layer with every learning rate, on the first
    seed and with the first ``l2``, thinned out rung by rung; the best ``finalists`` go on.
    *Penalty*: those with every ``l2``, one epoch each, where there are several. *Final*: the best
    ``finalists`` with every seed, from zero, to the end. Without rungs there is only the final
    stage, over everything.

    Attributes:
        name: its name; settings changed afterwards are in the fields.
        layers: see `parse_layers`.
        train_docs: the most training documents, where the user gives no number.
        selection_docs: the most selection documents, likewise.
        epochs: the most epochs of a finalist.
        min_epochs: epochs before ``patience`` may stop it.
        patience: epochs without a better selection score after which it stops; ``None``: never.
        seeds: how many seeds each finalist is trained with.
        lr: learning rates of Adam. A number is in residual-stream units: a step moves each entry of the
            vector by about so much. ``"0.01r"`` is relative: r is the root mean square entry of a typical
            hidden state at the layer (their median norm over the square root of hidden_size), so that a step
            moves the vector by about 1 % of the residual norm, in any model. Everything is then trained as if
            hidden states were measured in r: a method's other parameters, and ``clip``, too.
        l2: values of lambda in the penalty lambda * ||v||^2; ``"0.001r"``: with v measured in r.
        clip: gradient norm above which gradients are scaled down; ``None``: never.
        batch_size: documents per optimiser step.
        share_fewshot: how many documents show the same few-shot examples, where they show any. They share
            a row, whose common part is computed once, and an optimiser step.
        rungs: the rounds of the search; none: no search.
        finalists: how many (layer, lr, l2) reach the final stage; not used without rungs.
        regression: stop a finalist whose selection score falls behind the baseline's.
        retries: how often to start again from a small random vector when the best finalist is no
            better than the baseline; from the second time on at the next-best layer.
        criterion: what makes one candidate better than another; see `lm_eval_aft.training.selection`.
        lengths: not empty: there is no optimiser; a backward pass gives the directions, and these lengths are
            tried along them, as shares of the median residual norm; see `lm_eval_aft.training.onepass`.
        refine: then the most steps that follow, each on the gradient of all training documents.
    """

    name: str
    layers: str = "all"
    train_docs: Count = 500
    selection_docs: Count = 500
    epochs: Count = 10
    min_epochs: Count = 1
    patience: Count | None = 3
    seeds: Count = 3
    lr: Annotated[tuple[Positive | Relative, ...], Field(min_length=1)] = (1e-3,)
    l2: Annotated[tuple[NotNegative | Relative, ...], Field(min_length=1)] = (0.0,)
    clip: Positive | None = 1.0
    batch_size: Count = 1
    share_fewshot: Count = 1
    rungs: Annotated[tuple[Rung, ...], Field(strict=False)] = ()
    finalists: Count = 1
    regression: bool = False
    retries: Annotated[int, Field(ge=0)] = 0
    criterion: Annotated[str, _one_of(CRITERIA)] = DEFAULT_CRITERION
    lengths: tuple[Positive, ...] = ()
    refine: Annotated[int, Field(ge=0)] = 0

    @property
    def one_pass(self) -> bool:
        """Whether directions come from one backward pass, not from an optimiser."""
        return bool(self.lengths)

    @property
    def search_rounds(self) -> tuple[Rung, ...]:
        """With one pass: the rungs, or one on all selection documents, since lengths have to be searched."""
        return self.rungs or (Rung(1, 1, 1, 1),)

    def changed(self, changes: Mapping[str, Any]) -> Protocol:
        """This protocol with some fields replaced; entries of ``None`` are left as they are.

        ``patience`` or ``clip`` of 0 switches them off; ``lr`` and ``l2`` may be single values, or text as
        their flags take it.

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
            if name in (_OPTIMISER if self.one_pass else _ONE_PASS):
                raise AFTError(
                    f"The protocol {self.name!r} has no setting {name!r}: it takes its directions from "
                    + ("one backward pass." if self.one_pass else "an optimiser."),
                    f"Leave it out, or choose another of: {', '.join(PROTOCOLS)}.",
                )
            if name == "lengths" and not value:
                raise AFTError("There are no lengths to try.", "Give at least one, or leave out the setting.")
            if name in ("patience", "clip") and not value:
                value = None
            if name in ("lr", "l2"):
                value = parse_rates(value) if isinstance(value, str | list | tuple) else value
            if name in ("lr", "l2", "lengths"):
                if type(value) in (int, float):
                    with suppress(OverflowError):  # an integer that no float holds is refused with the rest
                        value = float(value)
                    value = (value,)
                value = tuple(value) if isinstance(value, list) else value
            wanted[name] = value
        return replace(self, **wanted)

    def without_training(self) -> Protocol:
        """This protocol for methods that are computed: every layer is judged once."""
        once = replace(self, epochs=1, min_epochs=1, patience=None, rungs=(), retries=0)
        return replace(once, lr=self.lr[:1], l2=(0.0,), regression=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of its settings, for ledgers and headers; the criterion only where it is unusual."""
        values = {**asdict(self), "rungs": [str(rung) for rung in self.rungs]}
        if self.criterion == DEFAULT_CRITERION:
            del values["criterion"]
        for name in _OPTIMISER if self.one_pass else _ONE_PASS:
            del values[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Stage:
    """Candidates that go through the same epochs together.

    Attributes:
        name: ``search``, ``penalty`` or ``final``; with one pass ``pass``, ``search``, ``line``, ``final`` or
            ``refine``.
        candidates: how many there are.
        train, selection: documents to train and evaluate on, in each epoch.
        epochs: how many (the most, in the final stage).
        keep: how many of them go on afterwards.
        reuses_frozen: whether the frozen passes of the first epoch serve the others too.
    """

    name: str
    candidates: int
    train: int
    selection: int
    epochs: int
    keep: int
    reuses_frozen: bool = False

    @property
    def documents(self) -> int:
        """(candidate, document) pairs to train and evaluate on, at most."""
        return self.candidates * self.epochs * (self.train + self.selection)


def schedule(protocol: Protocol, layers: int, train: int, selection: int) -> list[Stage]:
    """A protocol's stages for these numbers of layers and documents, before any retry."""
    if protocol.one_pass:
        return _one_pass_stages(protocol, layers, train, selection)
    stages = []
    settings = layers * len(protocol.lr)
    for place, rung in enumerate(protocol.rungs, start=1):
        keep = min(settings, protocol.finalists)
        if place < len(protocol.rungs):  # always enough for the final stage
            keep = max(keep, math.ceil(settings * rung.keep))
        seen = (documents_of(train, rung.train), documents_of(selection, rung.selection))
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


def _one_pass_stages(protocol: Protocol, directions: int, train: int, selection: int) -> list[Stage]:
    """The pass; rounds of about three lengths for each direction left; the line search and the refinement.

    The line search goes over the last round's documents; what it finds is scored on the others too.
    """
    stages = [Stage("pass", 1, train * protocol.seeds, 0, 1, directions)]
    for place, rung in enumerate(protocol.search_rounds):
        keep = min(directions, max(protocol.finalists, math.ceil(directions * rung.keep)))
        stages.append(
            Stage(
                "search",
                (3 if place else 1) * directions,
                0,
                documents_of(selection, rung.selection),
                1,
                keep,
            )
        )
        directions = keep
    finals = min(directions, protocol.finalists) * protocol.seeds
    last = stages[-1].selection
    stages.append(Stage("line", finals, 0, last, LINE_SEARCH, finals, True))
    if last < selection:
        stages.append(Stage("final", finals, 0, selection - last, 1, finals, True))
    if protocol.refine:
        stages.append(Stage("refine", finals, train, selection, protocol.refine, 1, True))
    return stages


def documents_of(documents: int, part: float) -> int:
    """How many documents that share is."""
    return min(documents, max(SMALLEST_SHARE, math.ceil(documents * part)))


# What suits a model depends on how long its hidden states are (see `Protocol`). The best of SmolLM2-135M on
# arc_easy is 0.01r, the best vectors are 3 % to 30 % of the residual norm.
_LEARNING_RATES = ("0.001r", "0.003r", "0.01r", "0.03r", "0.1r")
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
            l2=(0.0, "0.0001r", "0.001r", "0.01r"),
            rungs=(Rung(1 / 8, 1 / 4, 1, 1 / 3), Rung(1 / 4, 1 / 2, 1, 1 / 3), Rung(1, 1, 1, 1 / 2)),
            finalists=2,
            retries=3,
        ),
        Protocol("full", train_docs=400, lr=_LEARNING_RATES, l2=("0.001r",)),
        Protocol(
            "onepass",
            seeds=1,
            share_fewshot=8,
            rungs=(Rung(1, 1 / 32, 1, 1 / 5), Rung(1, 1 / 8, 1, 1 / 3), Rung(1, 1 / 4, 1, 1 / 2)),
            lengths=tuple(2.0**k for k in range(-12, 2)),
            refine=12,
        ),
    )
}
# Where none is named, see `usual_protocol`.
DEFAULT_PROTOCOL = "onepass"
WITH_OPTIMISER = "adaptive"


def find_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        AFTError: there is none.
    """
    if name not in PROTOCOLS:
        raise AFTError(f"There is no protocol {name!r}.", f"Choose one of: {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def usual_protocol(settings: Mapping[str, Any]) -> str:
    """The protocol of a plan that names none: one backward pass, where that can do what is asked.

    Methods whose output depends on the hidden state, settings of an optimiser (``lr=1e-2``) and the screen
    of layers need the other one.

    >>> usual_protocol({"method": "static"}), usual_protocol({"method": "mlp"}), usual_protocol({"lr": 1e-2})
    ('onepass', 'adaptive', 'adaptive')
    """
    method = find_method(settings.get("method") or DEFAULT_METHOD)
    asked = any(settings.get(name) is not None for name in _OPTIMISER)
    possible = method.constant and method.trained and settings.get("screen", "off") == "off"
    return DEFAULT_PROTOCOL if possible and not asked else WITH_OPTIMISER


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


def parse_rates(given: str | Sequence[float | str]) -> tuple[float | str, ...]:
    """Learning rates or penalties, comma-separated or one by one: numbers, or relative to r, as in ``0.01r``.

    Raises:
        AFTError: unreadable.

    >>> parse_rates("1e-3, 0.010r")
    (0.001, '0.01r')
    """
    try:
        parts = given.split(",") if isinstance(given, str) else given
        return tuple(read_rate(part) if isinstance(part, str) else part for part in parts)
    except ValueError as error:
        raise AFTError(
            f"Cannot read the numbers {given!r}.",
            "Examples: 1e-3, or 1e-4,1e-3,1e-2, or relative to the hidden states: 0.003r,0.01r.",
        ) from error


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


@settings
class RFTSettings:
    """The numbers of rejection-sampling fine-tuning, see `lm_eval_aft.training.rft`.

    Attributes:
        samples: solutions sampled per problem and round.
        rounds: the most rounds.
        temperature: of sampling; everything else about sampling is set by the task and the model.
        filter: the task's filter whose marks count; ``None``: its first.
    """

    samples: Count = 8
    rounds: Count = 3
    temperature: Positive = 0.7
    filter: str | None = None


@settings
class TrainingPlan:
    """Everything that decides what a training run does; two equal plans give equal vectors.

    ``train_docs`` and ``selection_docs`` are exact numbers; left open, they are as many as the
    protocol wants and the task has. ``task`` is what ``lm_eval --tasks`` takes; several tasks are mixed
    evenly (`lm_eval_aft.harness.splits`), and the numbers are totals. ``task_metadata`` is lm-eval's
    ``--metadata``, for tasks that build their documents for a model. ``choice_loss``, ``margin`` and
    ``label_smoothing`` are those of `lm_eval_aft.training.objectives`. ``calibrate`` chooses the finished
    vector's coefficient on the selection split; ``norm_cap`` bounds its norm, as a share of the median
    residual norm at its layer. ``rft`` is set if and only if that is the objective.
    """

    task: str
    protocol: Protocol = field(default_factory=lambda: find_protocol(DEFAULT_PROTOCOL))
    first_seed: int = 0
    train_docs: int | None = None
    selection_docs: int | None = None
    train_split: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    objective: Annotated[str, _one_of(OBJECTIVES)] | None = None
    metric: str | None = None
    choice_loss: Annotated[str, _one_of(CHOICE_LOSSES)] | None = None
    margin: Number | None = None
    label_smoothing: Number | None = None
    control: Annotated[str, _one_of(CONTROLS)] | None = None
    method: str = DEFAULT_METHOD
    positions: Annotated[str, _one_of((*POSITIONS, "auto"))] = "all"
    calibrate: bool = False
    norm_cap: Number | None = None
    screen: str = "off"
    include_path: Annotated[tuple[str, ...], BeforeValidator(_paths)] = ()
    task_metadata: dict[str, Any] | None = None
    rft: RFTSettings | None = None

    def seeds(self) -> range:
        """The seeds themselves."""
        return range(self.first_seed, self.first_seed + self.protocol.seeds)

    @property
    def tasks(self) -> list[str]:
        """The tasks one by one."""
        return [name.strip() for name in self.task.split(",")]

    @classmethod
    def of(
        cls, task: str | Sequence[str], protocol: str | Protocol | None = None, **settings: Any
    ) -> TrainingPlan:
        """A plan from a protocol's name, changes to the protocol, and fields of the plan.

        Without a protocol it is `usual_protocol`'s.

        Fields of `RFTSettings` are given as ``rft_samples``, ``rft_rounds`` and so on.

        Raises:
            AFTError: an unknown protocol, an unknown or impossible setting, or a task named twice.
        """
        task = task if isinstance(task, str) else ",".join(task)
        names = [name.strip() for name in task.split(",")]
        if len(set(names)) < len(names) or not all(names):
            raise AFTError(f"The tasks {task!r} name one twice, or none.", "Name each task once.")
        protocol = usual_protocol(settings) if protocol is None else protocol
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
        """Plain values, for ledgers and headers; ``task_metadata`` only where there is any."""
        values = {**asdict(self), "protocol": self.protocol.to_dict()}
        return values if self.task_metadata else {k: v for k, v in values.items() if k != "task_metadata"}
