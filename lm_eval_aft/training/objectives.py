"""What training minimises: the objectives, and the losses over a document's options.

To add an objective, write a class here under ``@register_objective``: ``--objective`` and its help read the
table `OBJECTIVES`. Importing this module does not import torch, so that help texts stay quick.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lm_eval_aft._util.errors import AFTError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lm_eval_aft.engine.batching import Batch
    from lm_eval_aft.training.selection import Score

CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "both")


class Objective(ABC):
    """A loss per document, and the summary of many documents' outcomes.

    Attributes:
        name: its name in flags, headers and reports.
        help: what it trains towards, in a few words.
        settings: those of ``metric``, ``choice_loss``, ``margin`` and ``label_smoothing`` that it takes.
        controls: the placebos it can be trained as, besides ``random``.
        samples: whether it trains on answers that the model samples, so that the task must generate some.
        metric: the task's metric that it imitates.
        loss: its loss over options, where it has one.
        note: what to tell the user where the task reports something else than ``metric``, else ``""``.
    """

    name: str
    help: str = ""
    settings: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    samples: bool = False
    metric: str
    loss: ChoiceLoss | None = None
    note: str = ""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of lm-eval that ``metric`` stands for."""
        return (self.metric,)

    @classmethod
    def make(cls, metric: str | None, task_metrics: Sequence[str], loss: ChoiceLoss) -> Objective:
        """The objective for a task that reports these metrics; ``metric`` is the user's choice."""
        return cls()

    @abstractmethod
    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable."""

    @abstractmethod
    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """What `summarise` needs to know of every document."""

    @abstractmethod
    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Mean scores over documents, the temperature fitted on all of them."""


OBJECTIVES: dict[str, type[Objective]] = {}
T = TypeVar("T", bound=Objective)


def register_objective(cls: type[T]) -> type[T]:
    """Class decorator: make an objective available under its name."""
    OBJECTIVES[cls.name] = cls
    return cls


def make_objective(
    name: str,
    metric: str | None,
    task_metrics: Sequence[str],
    *,
    choice_loss: str | None = None,
    margin: float | None = None,
    label_smoothing: float | None = None,
) -> Objective:
    """The objective called ``name``; its metric defaults to acc_norm, acc or acc_bytes, as the task reports.

    Args:
        choice_loss, margin, label_smoothing: see `ChoiceLoss`; for ``choice`` only.

    Raises:
        AFTError: unknown objective or metric, or settings that do not fit each other.

    >>> make_objective("choice", None, ["acc", "acc_norm"]).metric
    'acc_norm'
    """
    if name not in OBJECTIVES:
        raise AFTError(f"There is no objective {name!r}.", f"Choose one of: {', '.join(OBJECTIVES)}.")
    given = {
        "choice_loss": choice_loss,
        "margin": margin,
        "label_smoothing": label_smoothing,
        "metric": metric,
    }
    kind = OBJECTIVES[name]
    unused = [key for key, value in given.items() if value is not None and key not in kind.settings]
    if unused:
        raise AFTError(
            f"{', '.join('--' + key.replace('_', '-') for key in unused)} means nothing to the objective "
            f"{name!r}, which has no options to choose from.",
            "Leave it out, or train on a multiple-choice task.",
        )
    return kind.make(metric, task_metrics, ChoiceLoss.of(choice_loss, margin, label_smoothing))


@register_objective
class Choice(Objective):
    """A loss over a document's options, scored as the harness's metric scores them.

    For ``acc`` an option's score is its summed log-likelihood; for ``acc_norm`` that divided by
    its length in characters, times the document's mean option length: the same order as the
    harness's, on the scale of a sum; for ``acc_bytes`` likewise with lengths in bytes. With several
    right options, the probability of any counts.

    ``both`` takes each metric's scores separately: a document's loss is the mean of its two losses;
    the selection score is the mean of the two metrics' selection scores, each after fitting its own
    temperature (``temperature`` is their geometric mean); ``cross_entropy`` and ``accuracy`` are the
    means of the two metrics' values, and ``stderr`` is that of documents' means.

    Whatever the loss, documents are scored by temperature-fitted cross-entropy, so that vectors trained
    with different losses can be compared.
    """

    name = "choice"
    help = "the right option"
    settings = ("choice_loss", "margin", "label_smoothing", "metric")
    controls = ("shuffled",)

    def __init__(self, metric: str = "acc_norm", loss: ChoiceLoss | None = None) -> None:
        if metric not in CHOICE_METRICS:
            raise AFTError(
                f"The choice objective knows no metric {metric!r}.",
                f"Use one of: {', '.join(CHOICE_METRICS)}.",
            )
        self.metric = metric
        self.loss: ChoiceLoss = loss or ChoiceLoss()

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("acc", "acc_norm") if self.metric == "both" else (self.metric,)

    @classmethod
    def make(cls, metric: str | None, task_metrics: Sequence[str], loss: ChoiceLoss) -> Choice:
        own = (name for name in ("acc_norm", "acc", "acc_bytes") if name in task_metrics)
        return cls(metric or next(own, "acc"), loss)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        import torch

        tables, gold = self._scores(logits, batch)
        return torch.stack([self.loss(scores, gold) for scores in tables]).mean(0)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Per document an array (metrics + 1, options): each metric's scores, then 1 for right options."""
        import torch

        tables, gold = self._scores(logits, batch)
        rows = torch.stack([*tables, gold.to(tables[0].dtype)], dim=1).detach().double().cpu().numpy()
        return [row[:, : len(doc.pairs)] for row, doc in zip(rows, batch.documents, strict=True)]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        from lm_eval_aft.training.selection import choice_score

        return choice_score(outcomes)

    def _scores(self, logits: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Each metric's scores (documents, most options), padded with -inf, and a mask of the right ones."""
        import torch

        from lm_eval_aft.engine.batching import option_logprobs

        sums = option_logprobs(logits, batch)
        columns = [i for document in batch.documents for i in range(len(document.pairs))]
        place = (batch.document.to(sums.device), torch.tensor(columns, device=sums.device))
        shape = (len(batch.documents), max(columns) + 1)
        tables = []
        for metric in self.metrics:
            values = sums if metric == "acc" else _normalised(sums, batch)
            tables.append(sums.new_full(shape, -math.inf).index_put(place, values))
        gold = torch.zeros(shape, dtype=torch.bool)
        right = [(i, option) for i, document in enumerate(batch.documents) for option in document.gold]
        gold[tuple(torch.tensor(right).T)] = True
        return tables, gold.to(sums.device)


def _normalised(sums: Tensor, batch: Batch) -> Tensor:
    """Log-likelihoods (options,) per character or byte, times the mean length of their document's options."""
    flat = [length for document in batch.documents for length in document.lengths]
    means = [sum(document.lengths) / len(document.lengths) for document in batch.documents]
    return sums / sums.new_tensor(flat) * sums.new_tensor(means)[batch.document.to(sums.device)]


@register_objective
class LM(Objective):
    """Token cross-entropy of the gold continuation, averaged over its tokens."""

    name = "lm"
    help = "the gold answer"
    controls: tuple[str, ...] = ("format",)
    metric = "token_accuracy"

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        from lm_eval_aft.engine.batching import token_logprobs

        return _per_document(-token_logprobs(logits, batch), batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Per document its loss at each inverse temperature, its accuracy, and its loss."""
        import torch

        from lm_eval_aft.training.selection import INVERSE_TEMPERATURES

        wide = logits.detach()
        rows = [self.losses(wide * float(beta), batch) for beta in INVERSE_TEMPERATURES]
        guesses = wide.argmax(-1)[batch.source.to(wide.device)]
        exact = (guesses == batch.targets.to(wide.device)).to(rows[0].dtype)
        rows += [_per_document(exact, batch), self.losses(wide, batch)]
        return list(torch.stack(rows, dim=1).double().cpu().numpy())

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        from lm_eval_aft.training.selection import token_score

        return token_score(outcomes)


@register_objective
class RFT(LM):
    """The same on solutions the model wrote itself and the task marked right: see `Rounds`."""

    name = "rft"
    help = "the model's own right answers"
    settings = ("metric",)  # the task's, that marks answers
    controls = ()
    samples = True


def _per_document(values: Tensor, batch: Batch) -> Tensor:
    """Mean over each document's scored tokens, shape (documents,)."""
    owner = batch.document.to(values.device)[batch.option.to(values.device)]
    empty = values.new_zeros(len(batch.documents))
    return empty.index_add(0, owner, values) / empty.index_add(0, owner, values.new_ones(values.shape))


CONTROLS = tuple(dict.fromkeys(["random", *(each for kind in OBJECTIVES.values() for each in kind.controls)]))


# Losses over a document's options, given each option's score and which are right.

CHOICE_LOSSES = ("cross-entropy", "margin")
DEFAULT_MARGIN = 1.0


@dataclass(frozen=True)
class ChoiceLoss:
    """The loss of the ``choice`` objective, from a document's option scores ``s`` in nats.

    ``cross-entropy``: -log of the probability, by a softmax over ``s``, of any right option. With
    label smoothing ``e`` it is ``(1 - e)`` times that, plus ``e`` times the mean over all options of
    -log of their probability (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7,
    with the uniform distribution over the document's own options).

    ``margin``: the hinge ``max(0, margin - (best right s - best wrong s))``; 0 where every option is
    right. Only documents within the margin have a gradient.

    Attributes:
        name: ``cross-entropy`` or ``margin``.
        margin: nats the best right option should lead by.
        label_smoothing: ``e``, in [0, 1).
        temperature: scores are divided by it first.
    """

    name: str = "cross-entropy"
    margin: float = DEFAULT_MARGIN
    label_smoothing: float = 0.0
    temperature: float = 1.0

    @classmethod
    def of(
        cls, name: str | None = None, margin: float | None = None, label_smoothing: float | None = None
    ) -> ChoiceLoss:
        """The loss with these settings; ``None`` is the default.

        Raises:
            AFTError: an unknown loss, a number out of range, or a number that the loss does not use.
        """
        name = name or "cross-entropy"
        if name not in CHOICE_LOSSES:
            raise AFTError(f"There is no choice loss {name!r}.", f"Use one of: {', '.join(CHOICE_LOSSES)}.")
        if margin is not None and name != "margin":
            raise AFTError(f"margin={margin:g} means nothing to {name}.", "Add --choice-loss margin.")
        if label_smoothing and name != "cross-entropy":
            raise AFTError(
                f"Label smoothing is for cross-entropy; the choice loss is {name!r}.",
                "Leave out --label-smoothing, or --choice-loss.",
            )
        if margin is not None and not 0 < margin < math.inf:
            raise AFTError(f"margin={margin:g} is invalid: expected > 0.", "Give a positive number of nats.")
        if label_smoothing is not None and not 0 <= label_smoothing < 1:
            raise AFTError(
                f"label_smoothing={label_smoothing:g} is invalid: expected 0 to 1.",
                "Give 0 or more, below 1.",
            )
        return cls(name, DEFAULT_MARGIN if margin is None else float(margin), float(label_smoothing or 0))

    def __call__(self, scores: Tensor, gold: Tensor) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable.

        Args:
            scores: (documents, options) in nats, padded with -inf.
            gold: (documents, options) whether an option is right.
        """
        if self.temperature != 1:
            scores = scores / self.temperature
        right = scores.masked_fill(~gold, -math.inf)
        if self.name == "margin":
            lead = right.amax(1) - scores.masked_fill(gold, -math.inf).amax(1)
            return (self.margin - lead).clamp(min=0)
        total = scores.logsumexp(1)
        loss = total - right.logsumexp(1)
        if not self.label_smoothing:
            return loss
        options = scores.isfinite()
        mean = scores.masked_fill(~options, 0.0).sum(1) / options.sum(1)
        return (1 - self.label_smoothing) * loss + self.label_smoothing * (total - mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for headers: the name and the number that this loss uses."""
        used = "margin" if self.name == "margin" else "label_smoothing"
        return {"name": self.name, used: getattr(self, used)}

    def __str__(self) -> str:
        if self.name == "margin":
            return f"margin of {self.margin:g} nats"
        return f"{self.name}, label smoothing {self.label_smoothing:g}" if self.label_smoothing else self.name


class Mixture(Objective):
    """One objective over several tasks, each with its own metric.

    Losses are those of each document's own task. The selection score is the mean over tasks of each
    task's own score, after fitting a temperature *per task*: with one temperature for all, a vector could
    win by making the tasks' confidences alike without ranking one option better. Tasks count equally,
    however many documents each has.

    Args:
        objectives: one per task, all of the same name.
        names: the tasks.
    """

    def __init__(self, objectives: Sequence[Objective], names: Sequence[str]) -> None:
        self.name = objectives[0].name
        self.metric = ", ".join(dict.fromkeys(objective.metric for objective in objectives))
        self.objectives = list(objectives)
        self.loss = objectives[0].loss
        self.names = list(names)
        self.note = " ".join(objective.note for objective in objectives if objective.note)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        import torch

        tables = {key: one.losses(logits, batch) for key, one in self._present(batch).items()}
        if len(tables) == 1:
            return next(iter(tables.values()))
        return torch.stack([tables[self._key(doc.task)][i] for i, doc in enumerate(batch.documents)])

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Each document's own objective's outcome, headed by a row (or entry) with its task's number."""
        import numpy as np

        tables = {key: one.outcomes(logits, batch) for key, one in self._present(batch).items()}
        found = []
        for i, document in enumerate(batch.documents):
            outcome = tables[self._key(document.task)][i]
            found.append(np.concatenate([np.full_like(outcome[:1], document.task), outcome]))
        return found

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Means over tasks; ``tasks`` holds each task's own score."""
        from lm_eval_aft.training.selection import mean_score

        groups: dict[int, list[NDArray[np.float64]]] = {}
        for outcome in outcomes:
            groups.setdefault(int(outcome.flat[0]), []).append(outcome[1:])
        return mean_score(
            {self.names[task]: self.objectives[task].summarise(groups[task]) for task in sorted(groups)}
        )

    def _key(self, task: int) -> str:
        return self.objectives[task].metric  # the same metric, the same computation

    def _present(self, batch: Batch) -> dict[str, Objective]:
        tasks = dict.fromkeys(document.task for document in batch.documents)
        return {self._key(task): self.objectives[task] for task in tasks}
