"""Statistics for two scores of the same documents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, ndtri, stdtrit

ALPHA = 0.05
POWER = 0.8
# Clusters are used as units if there are enough of them and none dominates.
MIN_CLUSTERS = 50
MAX_CLUSTER_SHARE = 0.05
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no detectable difference"

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def mean_stderr(values: Sequence[float] | Floats) -> float | None:
    """Standard error of a mean, sample standard deviation over sqrt(n); ``None`` when n < 2.

    The same figure as ``lm_eval.api.metrics.mean_stderr``.

    >>> mean_stderr([0.0, 1.0, 1.0, 0.0])
    0.28867513459481287
    """
    array = np.asarray(values, float)
    return float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else None


def seeds_interval(values: Sequence[float], documents: float) -> tuple[float, float]:
    """95 % interval of the mean over seeds that share their documents.

    A t interval over seeds alone would miss the sampling of documents: half widths over seeds and over
    documents are added in quadrature.

    Args:
        values: one for each seed, at least 2.
        documents: half width of the interval over documents.
    """
    mean = float(np.mean(values))
    half = math.hypot(float(stdtrit(len(values) - 1, 0.975)) * (mean_stderr(values) or 0.0), documents)
    return mean - half, mean + half


def wilson_interval(successes: float, n: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Score interval of one proportion (Wilson 1927, JASA 22:209-212).

    Raises:
        ValueError: n < 1.

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    if n < 1:
        raise ValueError("a proportion of nothing has no interval")
    bounds = scipy.stats.binomtest(int(successes), n).proportion_ci(1 - alpha, method="wilson")
    return float(bounds.low), float(bounds.high)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of a mean score: Wilson's if all are 0 or 1, else normal; ``None`` when n < 2."""
    if all(value in (0, 1) for value in values):
        return wilson_interval(sum(values), len(values))
    error = mean_stderr(values)
    if error is None:
        return None, None
    mean = float(np.mean(values))
    return mean - 1.96 * error, mean + 1.96 * error


def bonett_price_interval(wins: int, losses: int, n: int, alpha: float = ALPHA) -> tuple[float, float] | None:
    """Adjusted Wald interval for a difference of paired proportions; ``None`` when n < 2.

    With a = (wins + 1)/(n + 2) and b = (losses + 1)/(n + 2): a - b ± z sqrt((a + b - (a - b)²)/(n + 2))
    (Bonett and Price 2012, Journal of Educational and Behavioral Statistics 37:479-488).

    Raises:
        ValueError: impossible counts.
    """
    _check_counts(wins, losses, n)
    if n < 2:
        return None
    a, b = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = float(ndtri(1 - alpha / 2)) * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Exact two-sided McNemar p-value.

    Under the null each discordant document is as likely a win as a loss, so wins follow
    Binomial(wins + losses, 1/2) (McNemar 1947, Psychometrika 12:153-157; exact form in Fay 2010,
    Biostatistics 11:373-374). Without discordant documents p is 1.

    Raises:
        ValueError: a negative count.

    >>> mcnemar_exact(wins=5, losses=0)
    0.0625
    """
    _check_counts(wins, losses)
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


def mcnemar_power(n: int, discordance: float, difference: float, alpha: float = ALPHA) -> float:
    """Power of exact McNemar, given the true difference and the true share of discordant documents.

    Sums, over the number m of discordant documents, P(m) times the probability that
    Binomial(m, (discordance + difference) / (2 discordance)) falls where the test rejects
    (Duffy 1984, Biometrics 40:1005-1015). Shares are between 0 and 1.

    Raises:
        ValueError: impossible shares.
    """
    if not (0 < discordance <= 1 and abs(difference) <= discordance and n >= 1):
        raise ValueError("power needs n >= 1 and |difference| <= discordance, both shares")
    return _power(_rejections(n, discordance, alpha), discordance, difference)


def minimum_detectable_effect(
    n: int, discordance: float, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Smallest true difference that exact McNemar detects with ``power``, at this discordant share.

    Solves `mcnemar_power` for the difference by bisection, to 1e-5. ``None`` when even the largest
    possible difference (every discordant document a win) would be missed more often.
    """
    if n < 2 or discordance <= 0:
        return None
    table = _rejections(n, discordance, alpha)
    if _power(table, discordance, discordance) < power:
        return None
    low, high = 0.0, discordance
    while high - low > 1e-5:
        middle = (low + high) / 2
        if _power(table, discordance, middle) < power:
            low = middle
        else:
            high = middle
    return high


def bootstrap_interval(
    differences: Sequence[float] | Floats, alpha: float = ALPHA, seed: int = 0, draws: int | None = None
) -> tuple[float, float] | None:
    """Percentile interval of the mean of paired differences; ``None`` when n < 2.

    Documents are resampled, both scores of a document staying together (Efron and Tibshirani 1993, An
    Introduction to the Bootstrap, chapters 13 and 16).

    Args:
        draws: resamples; by default 9,999, fewer (at least 999) for more than 10,000 documents.
    """
    d = np.asarray(differences, float)
    if d.size < 2:
        return None
    draws = draws or int(min(9999, max(999, 10**8 // d.size)))
    bounds = scipy.stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=draws,
        batch=max(1, 4_000_000 // d.size),  # bounds the memory
        confidence_level=1 - alpha,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def sign_flip_test(sums: Sequence[float] | Floats, seed: int = 0, draws: int = 99_999) -> float:
    """Two-sided p-value that the sum of independent units' differences is 0.

    Under the null each unit's sign is arbitrary: p is the share of sign patterns whose absolute sum
    reaches the observed one (Fisher 1935, The Design of Experiments, section 21). Up to 16 non-zero units
    all patterns are enumerated; beyond that, patterns are drawn at random and the observed one is counted
    among them (Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39). Beyond 5,000 units the normal
    approximation is used.

    Args:
        sums: one total per unit (a document or a cluster).
    """
    d = np.asarray(sums, float)
    d = d[d != 0]
    if d.size == 0:
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-12)  # so that ties do not depend on the order of summation
    if d.size > 5000:
        return float(2 * ndtr(-observed / math.sqrt(float(np.square(d).sum()))))
    if d.size <= 16:
        patterns = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ d) >= observed))
    rng = np.random.default_rng(seed)
    step = max(1, 4_000_000 // d.size)
    reached = 0
    for start in range(0, draws, step):
        signs = rng.integers(0, 2, (min(step, draws - start), d.size), dtype=np.int8) * 2.0 - 1.0
        reached += int(np.sum(np.abs(signs @ d) >= observed))
    return (1 + reached) / (1 + draws)


def cluster_interval(
    differences: Sequence[float] | Floats, clusters: Sequence[Hashable], alpha: float = ALPHA
) -> tuple[float, float] | None:
    """Interval of a mean whose documents come in clusters; ``None`` with fewer than 2 clusters.

    Standard error from the clusters' summed deviations (Liang and Zeger 1986, Biometrika 73:13-22; for
    evaluations Miller 2024, arXiv:2411.00640) with the factor G/(G - 1); Student's t with G - 1 degrees of
    freedom.
    """
    d = np.asarray(differences, float)
    deviations = cluster_sums(d - d.mean(), clusters)
    count = deviations.size
    if count < 2:
        return None
    error = math.sqrt(count / (count - 1) * float(np.square(deviations).sum())) / d.size
    half = float(stdtrit(count - 1, 1 - alpha / 2)) * error
    return float(d.mean()) - half, float(d.mean()) + half


def cluster_sums(values: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Sum of the values of each cluster, in order of first appearance."""
    index: dict[Hashable, int] = {}
    codes = np.fromiter((index.setdefault(c, len(index)) for c in clusters), int, len(clusters))
    return np.asarray(np.bincount(codes, values, len(index)), float)


def usable_clusters(clusters: Sequence[Hashable | None]) -> bool:
    """Whether clusters are many (>= 50) and small (largest < 5 % of documents) enough to be units."""
    if not clusters or any(cluster is None for cluster in clusters):
        return False
    counts = Counter(clusters)
    return len(counts) >= MIN_CLUSTERS and max(counts.values()) < MAX_CLUSTER_SHARE * len(clusters)


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values, in the order given (Holm 1979, Scand. J. Statist. 6:65-70).

    Raises:
        ValueError: a value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError("p-values lie between 0 and 1")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def verdict(adjusted_p: float, difference: float, higher_is_better: bool = True, alpha: float = ALPHA) -> str:
    """*better* or *worse* when the adjusted p is below ``alpha``, else *no detectable difference*."""
    if not adjusted_p < alpha or difference == 0:
        return NO_DIFFERENCE
    return BETTER if (difference > 0) == higher_is_better else WORSE


def _rejections(n: int, discordance: float, alpha: float) -> tuple[Integers, Floats, Integers]:
    """Numbers m of discordant documents at which rejection is possible, P(m), and the largest count
    of the rarer outcome that rejects; m within 8 standard deviations of its mean."""
    spread = 8 * math.sqrt(n * discordance * (1 - discordance)) + 1
    first = max(0, math.floor(n * discordance - spread))
    m = np.arange(first, min(n, math.ceil(n * discordance + spread)) + 1)
    # The largest count whose tail is below alpha / 2; -1 where there is none.
    critical = scipy.stats.binom.ppf(alpha / 2, m, 0.5).astype(np.int64) - 1
    m, critical = m[critical >= 0], critical[critical >= 0]
    return m, scipy.stats.binom.pmf(m, n, discordance), critical


def _power(table: tuple[Integers, Floats, Integers], discordance: float, difference: float) -> float:
    m, chance, critical = table
    share = (discordance + abs(difference)) / (2 * discordance)
    return float(np.sum(chance * (bdtr(critical, m, 1 - share) + bdtr(critical, m, share))))


def _check_counts(wins: int, losses: int, n: int | None = None) -> None:
    if wins < 0 or losses < 0 or (n is not None and wins + losses > n):
        of = "" if n is None else f" of {n} documents"
        raise ValueError(f"{wins} wins and {losses} losses{of} cannot be")


# Two models' scores of the same documents, compared by the methods that suit the scores.


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two models' scores on the same ``n`` documents; scores are means, in the metric's unit.

    Attributes:
        n: documents.
        baseline, steered: mean scores.
        baseline_stderr, steered_stderr: standard errors of the means (``None`` when n < 2).
        difference: steered minus baseline.
        low, high: 95 % interval of the difference (``None`` when n < 2).
        p_value: two-sided.
        wins, losses: documents on which steered scored higher (lower).
        mde: smallest true difference detected with 80 % power (``None`` where there is none).
        test, interval: names of the methods used.
        clusters: number of clusters the test and interval treat as units (``None``: documents).
    """

    n: int
    baseline: float
    steered: float
    baseline_stderr: float | None
    steered_stderr: float | None
    difference: float
    low: float | None
    high: float | None
    p_value: float
    wins: int
    losses: int
    mde: float | None
    test: str
    interval: str
    clusters: int | None = None


def compare_paired(
    baseline: Sequence[float],
    steered: Sequence[float],
    clusters: Sequence[Hashable | None] | None = None,
    seed: int = 0,
) -> PairedComparison:
    """Compare scores paired by position, with methods that depend on the kind of score.

    Outcomes that are all 0 or 1: exact McNemar and Bonett-Price. Other scores: sign-flip test over
    documents and paired bootstrap. With usable clusters: sign-flip test and interval over clusters.

    Raises:
        ValueError: unequal lengths, nothing to compare, or a score that is not finite.

    >>> found = compare_paired(baseline=[0, 0, 1, 0], steered=[1, 0, 1, 1])
    >>> found.difference, found.wins, found.losses, found.p_value
    (0.5, 2, 0, 0.5)
    """
    before, after = np.asarray(baseline, float), np.asarray(steered, float)
    if before.shape != after.shape:
        raise ValueError(f"{before.size} outcomes cannot be paired with {after.size}")
    if before.size == 0:
        raise ValueError("there is nothing to compare")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("scores must be finite numbers")
    d = after - before
    n, wins, losses = int(d.size), int((d > 0).sum()), int((d < 0).sum())
    binary = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    units = None
    if clusters is not None and usable_clusters(clusters):
        sums = cluster_sums(d, clusters)
        units = int(sums.size)
        p, bounds = sign_flip_test(sums, seed), cluster_interval(d, clusters)
        names = ("sign-flip over clusters", "cluster-robust t")
    elif binary:
        p, bounds = mcnemar_exact(wins, losses), bonett_price_interval(wins, losses, n)
        names = ("exact McNemar", "Bonett-Price")
    else:
        p, bounds = sign_flip_test(d, seed), bootstrap_interval(d, seed=seed)
        names = ("sign-flip over documents", "paired bootstrap")
    mde = minimum_detectable_effect(n, (wins + losses) / n) if binary and units is None else None
    low, high = bounds or (None, None)
    return PairedComparison(
        n=n,
        baseline=float(before.mean()),
        steered=float(after.mean()),
        baseline_stderr=mean_stderr(before),
        steered_stderr=mean_stderr(after),
        difference=float(after.mean() - before.mean()),
        low=low,
        high=high,
        p_value=p,
        wins=wins,
        losses=losses,
        mde=mde,
        test=names[0],
        interval=names[1],
        clusters=units,
    )
