"""What training minimises, and the score by which layer and epoch are chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.engine.batching import Batch, option_logprobs, token_logprobs

CHOICE_METRICS = ("acc", "acc_norm", "both")
# Logarithms of the inverse temperatures tried first: 1/e^7 to e^7.
_LOG_BETA_STEP = 0.35
_LOG_BETAS = tuple(_LOG_BETA_STEP * i for i in range(-20, 21))
# Inverse temperatures at which token losses are kept; the minimum is interpolated between them.
_GRID = np.exp(np.linspace(np.log(0.25), np.log(4.0), 13))


@dataclass(frozen=True)
class Score:
    """How a candidate (or the baseline) does on the selection split.

    Attributes:
        score: mean cross-entropy in nats after fitting one temperature; lower is better. This is
            what choices are made on: a vector cannot win it by rescaling confidence.
        cross_entropy: the same at temperature 1.
        accuracy: share of documents answered right (``choice``) or of gold tokens that are the
            model's first guess (``lm``), between 0 and 1. Breaks ties only.
        temperature: the temperature fitted.
        n: number of documents.
        stderr: standard error of ``score`` over documents, in nats.
        tasks: of a mixture, each task's own score by its name.
    """

    score: float
    cross_entropy: float
    accuracy: float
    temperature: float
    n: int
    stderr: float = 0.0
    tasks: dict[str, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # As `to_dict` wrote them, when a run is resumed.
        own = {k: v if isinstance(v, Score) else Score(**v) for k, v in self.tasks.items()}
        object.__setattr__(self, "tasks", own)

    def order(self) -> tuple[float, float]:
        """Sorts better scores first."""
        return (self.score, -self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for ledgers and headers; ``tasks`` only of a mixture."""
        return {key: value for key, value in asdict(self).items() if key != "tasks" or value}


class Objective(Protocol):
    """A loss per document, and the summary of many documents' outcomes."""

    name: str
    metric: str

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable."""

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """What `summarise` needs to know of every document."""

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Mean scores over documents, the temperature fitted on all of them."""


class Choice:
    """A loss over a document's options, scored as the harness's metric scores them.

    For ``acc`` an option's score is its summed log-likelihood; for ``acc_norm`` that divided by
    its length in characters, times the document's mean option length: the same order as the
    harness's, on the scale of a sum. With several right options, the probability of any counts.

    ``both`` takes each metric's scores by themselves: a document's loss is the mean of its two losses;
    the selection score is the mean of the two metrics' selection scores, each after fitting a
    temperature of its own (``temperature`` is their geometric mean); ``cross_entropy`` and
    ``accuracy`` are the means of the two metrics' values, and ``stderr`` is that of documents' means.

    Whatever the loss, documents are judged by temperature-fitted cross-entropy: vectors trained with
    different losses are chosen, and can be compared, on one scale.
    """

    name = "choice"

    def __init__(self, metric: str = "acc_norm", loss: ChoiceLoss | None = None) -> None:
        if metric not in CHOICE_METRICS:
            raise AFTError(
                f"The choice objective knows no metric {metric!r}.",
                f"Use one of: {', '.join(CHOICE_METRICS)}.",
            )
        self.metric = metric
        self.loss = loss or ChoiceLoss()
        self._metrics = ("acc", "acc_norm") if metric == "both" else (metric,)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        tables, gold = self._scores(logits, batch)
        return torch.stack([self.loss(scores, gold) for scores in tables]).mean(0)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Per document an array (metrics + 1, options): each metric's scores, then 1 for right options."""
        tables, gold = self._scores(logits, batch)
        rows = torch.stack([*tables, gold.to(tables[0].dtype)], dim=1).detach().double().cpu().numpy()
        return [row[:, : len(doc.pairs)] for row, doc in zip(rows, batch.documents, strict=True)]

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        width = max(outcome.shape[1] for outcome in outcomes)
        table = np.full((len(outcomes), len(outcomes[0]), width), -np.inf)
        for i, outcome in enumerate(outcomes):
            table[i, :, : outcome.shape[1]] = outcome
        gold = table[:, -1] > 0
        fits = [_fit_temperature(table[:, k], gold) for k in range(table.shape[1] - 1)]
        losses = np.mean([fit.losses for fit in fits], axis=0)
        return Score(
            float(np.mean([fit.lowest for fit in fits])),
            float(np.mean([fit.plain for fit in fits])),
            float(np.mean([fit.accuracy for fit in fits])),
            float(np.exp(np.mean([fit.log_temperature for fit in fits]))),
            len(outcomes),
            _stderr(losses),
        )

    def _scores(self, logits: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Each metric's scores (documents, most options), padded with -inf, and a mask of the right ones."""
        sums = option_logprobs(logits, batch)
        columns = [i for document in batch.documents for i in range(len(document.pairs))]
        place = (batch.document.to(sums.device), torch.tensor(columns, device=sums.device))
        shape = (len(batch.documents), max(columns) + 1)
        tables = []
        for metric in self._metrics:
            values = _normalised(sums, batch) if metric == "acc_norm" else sums
            empty = torch.full(shape, -torch.inf, dtype=sums.dtype, device=sums.device)
            tables.append(empty.index_put(place, values))
        gold = torch.zeros(shape, dtype=torch.bool)
        for i, document in enumerate(batch.documents):
            gold[i, list(document.gold)] = True
        return tables, gold.to(sums.device)


def _normalised(sums: Tensor, batch: Batch) -> Tensor:
    """Log-likelihoods (options,) per character, times the mean length of their document's options."""
    flat = [length for document in batch.documents for length in document.lengths]
    means = [float(np.mean(document.lengths)) for document in batch.documents]
    place = {"dtype": sums.dtype, "device": sums.device}
    each = torch.tensor(means, **place)[batch.document.to(sums.device)]  # type: ignore[arg-type]
    return sums / torch.tensor(flat, **place) * each  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Fit:
    """Cross-entropies of one metric's scores at the inverse temperature that makes their mean lowest."""

    lowest: float
    plain: float
    accuracy: float
    log_temperature: float
    losses: NDArray[np.float64]


def _fit_temperature(scores: NDArray[np.float64], gold: NDArray[np.bool_]) -> _Fit:
    right = np.where(gold, scores, -np.inf)

    def losses(log_beta: float) -> NDArray[np.float64]:
        beta = np.exp(log_beta)
        found: NDArray[np.float64] = logsumexp(beta * scores, axis=1) - logsumexp(beta * right, axis=1)
        return found

    def mean_loss(log_beta: float) -> float:
        return float(np.mean(losses(log_beta)))

    # With several right options there may be more than one dip: find the lowest on a grid first.
    rough = min(_LOG_BETAS, key=mean_loss)
    near = (rough - _LOG_BETA_STEP, rough + _LOG_BETA_STEP)
    fitted = minimize_scalar(mean_loss, bounds=near, method="bounded", options={"xatol": 1e-6})
    hits = gold[np.arange(len(scores)), scores.argmax(axis=1)]
    best = float(fitted.x)
    return _Fit(float(fitted.fun), mean_loss(0.0), float(hits.mean()), -best, losses(best))


class LM:
    """Token cross-entropy of the gold continuation, averaged over its tokens."""

    name = "lm"
    metric = "token_accuracy"

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return _per_document(-token_logprobs(logits, batch), batch)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        wide = logits.detach()
        rows = [_per_document(-token_logprobs(wide * float(beta), batch), batch) for beta in _GRID]
        guesses = wide.argmax(-1)[batch.source.to(wide.device)]
        exact = (guesses == batch.targets.to(wide.device)).to(rows[0].dtype)
        rows += [_per_document(exact, batch), self.losses(wide, batch)]
        return list(torch.stack(rows, dim=1).double().cpu().numpy())

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        table = np.stack(outcomes)
        means = table.mean(axis=0)
        losses, accuracy, raw = means[: len(_GRID)], float(means[-2]), float(means[-1])
        best, grid = int(losses.argmin()), np.log(_GRID)
        log_beta, lowest = float(grid[best]), float(losses[best])
        if np.isfinite(losses).all():
            curve = CubicSpline(grid, losses)
            # Next to the lowest point only: elsewhere a spline may swing below losses that fall steeply.
            near = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
            flat = [at for at in curve.derivative().roots(extrapolate=False) if near[0] < at < near[1]]
            log_beta = float(min([grid[best], *flat], key=curve))
            lowest = float(curve(log_beta))
        stderr = _stderr(table[:, best])
        return Score(lowest, raw, accuracy, float(np.exp(-log_beta)), len(outcomes), stderr)


class RFT(LM):
    """The same on solutions the model wrote itself and the task marked right: see `Rounds`."""

    name = "rft"


def make_objective(
    name: str,
    metric: str | None,
    task_metrics: Sequence[str],
    *,
    choice_loss: str | None = None,
    margin: float | None = None,
    label_smoothing: float | None = None,
) -> Objective:
    """The objective called ``name``; its metric defaults to acc_norm where the task reports it.

    Args:
        choice_loss, margin, label_smoothing: see `ChoiceLoss`; for ``choice`` only.

    Raises:
        AFTError: unknown objective or metric, or settings that do not fit each other.
    """
    if name == "choice":
        loss = ChoiceLoss.of(choice_loss, margin, label_smoothing)
        return Choice(metric or ("acc_norm" if "acc_norm" in task_metrics else "acc"), loss)
    if name not in ("lm", "rft"):
        raise AFTError(f"There is no objective {name!r}.", "Use choice, lm or rft.")
    given = {"choice-loss": choice_loss, "margin": margin, "label-smoothing": label_smoothing}
    if name == "lm":  # of rft it names what marks the answers
        given["metric"] = metric
    if unused := [f"--{key}" for key, value in given.items() if value is not None]:
        raise AFTError(
            f"{', '.join(unused)} means nothing to the objective {name!r}, which has no options to choose.",
            "Leave it out, or train on a multiple-choice task.",
        )
    return LM() if name == "lm" else RFT()


def loss_of(objective: Objective) -> ChoiceLoss | None:
    """The loss over options, of objectives that have one; tasks of a mixture share theirs."""
    found = getattr(objective, "loss", None)
    return found if isinstance(found, ChoiceLoss) else None


def _stderr(losses: NDArray[np.float64]) -> float:
    """Standard error of a mean over documents; 0 for fewer than two."""
    return float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else 0.0


def _per_document(values: Tensor, batch: Batch) -> Tensor:
    """Mean over each document's scored tokens, shape (documents,)."""
    owner = batch.document.to(values.device)[batch.option.to(values.device)]
    empty = torch.zeros(len(batch.documents), dtype=values.dtype, device=values.device)
    count = empty.index_add(0, owner, torch.ones_like(values))
    return empty.index_add(0, owner, values) / count


# Losses over a document's options, given each option's score and which are right.

CHOICE_LOSSES = ("cross-entropy", "margin")
DEFAULT_MARGIN = 1.0


@dataclass(frozen=True)
class ChoiceLoss:
    """What the ``choice`` objective makes of a document's option scores ``s`` in nats.

    ``cross-entropy``: -log of the probability, by a softmax over ``s``, of any right option. With
    label smoothing ``e`` it is ``(1 - e)`` times that, plus ``e`` times the mean over all options of
    -log of their probability (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7,
    with the uniform distribution over the document's own options).

    ``margin``: the hinge ``max(0, margin - (best right s - best wrong s))``; 0 where every option is
    right. Only documents nearer to the border than the margin have a gradient.

    Attributes:
        name: ``cross-entropy`` or ``margin``.
        margin: nats the best right option should lead by.
        label_smoothing: ``e``, in [0, 1).
    """

    name: str = "cross-entropy"
    margin: float = DEFAULT_MARGIN
    label_smoothing: float = 0.0

    @classmethod
    def of(
        cls, name: str | None = None, margin: float | None = None, label_smoothing: float | None = None
    ) -> ChoiceLoss:
        """The loss that these settings name; ``None`` is the default.

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
        if margin is not None and not 0 < margin < float("inf"):
            raise AFTError(f"margin={margin:g} makes no sense.", "Give a positive number of nats.")
        if label_smoothing is not None and not 0 <= label_smoothing < 1:
            raise AFTError(f"label_smoothing={label_smoothing:g} makes no sense.", "Give 0 or more, below 1.")
        return cls(name, DEFAULT_MARGIN if margin is None else float(margin), float(label_smoothing or 0))

    def __call__(self, scores: Tensor, gold: Tensor) -> Tensor:
        """Loss in nats of every document, shape (documents,); differentiable.

        Args:
            scores: (documents, options) in nats, padded with -inf.
            gold: (documents, options) whether an option is right.
        """
        right = scores.masked_fill(~gold, -torch.inf)
        if self.name == "margin":
            lead = right.amax(1) - scores.masked_fill(gold, -torch.inf).amax(1)
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


# Several tasks trained on together: documents interleaved evenly, each task judged on its own scale.


class Mixture:
    """One objective over several tasks, each with its own metric.

    Losses are each document's own task's. The selection score is the mean over tasks of each task's
    own score, after fitting a temperature *per task*: confidence is a nuisance of every task by
    itself, and with one temperature for all a vector could win by bringing the tasks' confidences
    into line without ranking one option better. Tasks count alike, however many documents each has.

    Args:
        objectives: one per task, all of the same name.
        names: the tasks.
    """

    def __init__(self, objectives: Sequence[Objective], names: Sequence[str]) -> None:
        self.name = objectives[0].name
        self.metric = ", ".join(dict.fromkeys(objective.metric for objective in objectives))
        self.objectives = list(objectives)
        self.loss = loss_of(objectives[0])
        self.names = list(names)

    def losses(self, logits: Tensor, batch: Batch) -> Tensor:
        tables = {key: one.losses(logits, batch) for key, one in self._present(batch).items()}
        if len(tables) == 1:
            return next(iter(tables.values()))
        rows = [tables[self._key(document.task)][i] for i, document in enumerate(batch.documents)]
        return torch.stack(rows)

    def outcomes(self, logits: Tensor, batch: Batch) -> list[NDArray[np.float64]]:
        """Each document's own objective's outcome, headed by a row (or entry) that says its task."""
        tables = {key: one.outcomes(logits, batch) for key, one in self._present(batch).items()}
        found = []
        for i, document in enumerate(batch.documents):
            outcome = tables[self._key(document.task)][i]
            found.append(np.concatenate([np.full_like(outcome[:1], document.task), outcome]))
        return found

    def summarise(self, outcomes: Sequence[NDArray[np.float64]]) -> Score:
        """Means over tasks; ``temperature`` is the geometric mean; ``tasks`` holds each task's own."""
        groups: dict[int, list[NDArray[np.float64]]] = {}
        for outcome in outcomes:
            groups.setdefault(int(outcome.flat[0]), []).append(outcome[1:])
        own = {task: self.objectives[task].summarise(groups[task]) for task in sorted(groups)}
        scores = list(own.values())

        def mean(values: Sequence[float]) -> float:
            return math.fsum(values) / len(values)

        return Score(
            mean([score.score for score in scores]),
            mean([score.cross_entropy for score in scores]),
            mean([score.accuracy for score in scores]),
            math.exp(mean([math.log(score.temperature) for score in scores])),
            sum(score.n for score in scores),
            math.sqrt(math.fsum(score.stderr**2 for score in scores)) / len(scores),
            {self.names[task]: score for task, score in own.items()},
        )

    def _key(self, task: int) -> str:
        return self.objectives[task].metric  # the same metric, the same computation

    def _present(self, batch: Batch) -> dict[str, Objective]:
        tasks = dict.fromkeys(document.task for document in batch.documents)
        return {self._key(task): self.objectives[task] for task in tasks}
