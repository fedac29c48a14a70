"""The selection criterion: what makes one candidate better than another on the selection split.

Every choice of a run is made here: epochs, layers, learning rates, penalties, seeds, retries, early
stopping, the coefficient of a calibrated vector, the points of a search and the rounds of ``rft``.

To add a criterion, write a function under ``@register_criterion``; the protocol setting ``criterion``
takes its name.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from lm_eval_aft._util.errors import AFTError

Key = tuple[float, ...]


class Ranked(Protocol):
    """What a criterion looks at: of one candidate, or means over seeds."""

    @property
    def score(self) -> float:
        """Cross-entropy in nats after fitting one temperature."""

    @property
    def accuracy(self) -> float:
        """Share of answers that are right, between 0 and 1."""


@dataclass(frozen=True)
class Score:
    """How a candidate (or the baseline) does on the selection split.

    Attributes:
        score: mean cross-entropy in nats after fitting one temperature; lower is better. A vector cannot
            improve it by rescaling confidence.
        cross_entropy: the same at temperature 1.
        accuracy: share of documents answered right (``choice``) or of gold tokens that are the
            model's first guess (``lm``), between 0 and 1.
        temperature: the fitted temperature.
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
        # A resumed run gives them as `to_dict` wrote them.
        own = {k: v if isinstance(v, Score) else Score(**v) for k, v in self.tasks.items()}
        object.__setattr__(self, "tasks", own)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Score:
        """The score in a ledger's line, which has other entries too."""
        return cls(**{each.name: line[each.name] for each in fields(cls) if each.name in line})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for ledgers and headers; ``tasks`` only of a mixture."""
        return {key: value for key, value in asdict(self).items() if key != "tasks" or value}


R = TypeVar("R", bound=Ranked)
T = TypeVar("T")


@dataclass(frozen=True)
class Criterion:
    """A way to choose among scores.

    Attributes:
        name: as the protocol setting ``criterion`` takes it.
        key: sorts better scores first. Its first number decides whether something beats the baseline; the
            others break ties.
    """

    name: str
    key: Callable[[Ranked], Key]

    def best(self, scores: Iterable[R]) -> R:
        """The best of several scores; the first of equal ones."""
        return min(scores, key=self.key)

    def improves(self, score: Ranked, on: Ranked) -> bool:
        """Whether a score is better than another, ties broken."""
        return self.key(score) < self.key(on)

    def change(self, score: Ranked, baseline: Ranked) -> float:
        """The difference from the baseline; negative is better."""
        return self.key(score)[0] - self.key(baseline)[0]

    def coefficient(self, curve: Mapping[float, Ranked]) -> float:
        """The best coefficient of a curve of scores; of equal ones, the nearest to 1."""
        return min(curve, key=lambda c: (*self.key(curve[c]), abs(c - 1)))


CRITERIA: dict[str, Criterion] = {}
DEFAULT_CRITERION = "cross-entropy"


def register_criterion(name: str) -> Callable[[Callable[[Ranked], Key]], Criterion]:
    """Decorator: make a function from a score to a sort key (best first) a criterion of this name.

    Keys that are not finite come last.
    """

    def register(key: Callable[[Ranked], Key]) -> Criterion:
        def finite_first(score: Ranked) -> Key:
            found = key(score)
            return found if all(map(math.isfinite, found)) else (math.inf,) * len(found)

        CRITERIA[name] = Criterion(name, finite_first)
        return CRITERIA[name]

    return register


def find_criterion(name: str) -> Criterion:
    """The criterion called ``name``.

    Raises:
        AFTError: there is none.
    """
    if name not in CRITERIA:
        raise AFTError(f"There is no criterion {name!r}.", f"Choose one of: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


@register_criterion(DEFAULT_CRITERION)
def by_cross_entropy(score: Ranked) -> Key:
    """Temperature-fitted cross-entropy, then accuracy."""
    return (score.score, -score.accuracy)


def mean_of_seeds(scores: Sequence[Ranked]) -> tuple[float, float]:
    """Mean score and accuracy of one setting over its seeds."""
    return (
        statistics.fmean(score.score for score in scores),
        statistics.fmean(score.accuracy for score in scores),
    )


def median_seed(best_first: Sequence[T]) -> T:
    """The median of a setting's seeds; of an even number, the worse of the middle two."""
    return best_first[len(best_first) // 2]


def solve_rate(rates: Mapping[str, Any]) -> Key:
    """Sorts worse rounds of ``rft`` first: by greedy accuracy, then by the share of right samples."""
    return (rates["greedy"], rates["pass_at"]["1"])


# Scores: cross-entropy at the temperature that makes its mean lowest.

# Logarithms of the inverse temperatures tried first: 1/e^7 to e^7.
_LOG_BETA_STEP = 0.35
_LOG_BETAS = tuple(_LOG_BETA_STEP * i for i in range(-20, 21))
# Inverse temperatures at which token losses are kept; the minimum is interpolated between them.
INVERSE_TEMPERATURES: NDArray[np.float64] = np.exp(np.linspace(np.log(0.25), np.log(4.0), 13))


def choice_score(outcomes: Sequence[NDArray[np.float64]]) -> Score:
    """The score over documents with options, a temperature being fitted for each metric.

    Args:
        outcomes: per document an array (metrics + 1, options): each metric's scores, then 1 for right ones.
    """
    width = max(outcome.shape[1] for outcome in outcomes)
    table = np.full((len(outcomes), len(outcomes[0]), width), -np.inf)
    for i, outcome in enumerate(outcomes):
        table[i, :, : outcome.shape[1]] = outcome
    gold = table[:, -1] > 0
    fits = [_fit_temperature(table[:, k], gold) for k in range(table.shape[1] - 1)]
    return Score(
        float(np.mean([fit.lowest for fit in fits])),
        float(np.mean([fit.plain for fit in fits])),
        float(np.mean([fit.accuracy for fit in fits])),
        float(np.exp(np.mean([fit.log_temperature for fit in fits]))),
        len(outcomes),
        _stderr(np.mean([fit.losses for fit in fits], axis=0)),
    )


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


def token_score(outcomes: Sequence[NDArray[np.float64]]) -> Score:
    """The score over documents with one continuation, at the lowest point of the interpolated losses.

    Args:
        outcomes: per document its loss at each of `INVERSE_TEMPERATURES`, its accuracy, and its loss at 1.
    """
    table = np.stack(outcomes)
    means = table.mean(axis=0)
    losses, accuracy, raw = means[:-2], float(means[-2]), float(means[-1])
    best, grid = int(losses.argmin()), np.log(INVERSE_TEMPERATURES)
    log_beta, lowest = float(grid[best]), float(losses[best])
    if np.isfinite(losses).all():
        curve = CubicSpline(grid, losses)
        # Next to the lowest point only: elsewhere a spline may swing below losses that fall steeply.
        near = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
        flat = [at for at in curve.derivative().roots(extrapolate=False) if near[0] < at < near[1]]
        log_beta = float(min([grid[best], *flat], key=curve))
        lowest = float(curve(log_beta))
    return Score(lowest, raw, accuracy, float(np.exp(-log_beta)), len(outcomes), _stderr(table[:, best]))


def mean_score(tasks: Mapping[str, Score]) -> Score:
    """The score of a mixture: means over tasks, and the geometric mean of their temperatures."""
    scores = list(tasks.values())
    return Score(
        statistics.fmean(score.score for score in scores),
        statistics.fmean(score.cross_entropy for score in scores),
        statistics.fmean(score.accuracy for score in scores),
        statistics.geometric_mean(score.temperature for score in scores),
        sum(score.n for score in scores),
        math.sqrt(math.fsum(score.stderr**2 for score in scores)) / len(scores),
        dict(tasks),
    )


def _stderr(losses: NDArray[np.float64]) -> float:
    """Standard error of a mean over documents; 0 for fewer than two."""
    return float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else 0.0
