"""Two systems' scores of the same documents, compared by the methods that suit the scores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lm_eval_aft.reporting.stats import (
    bonett_price_interval,
    bootstrap_interval,
    cluster_interval,
    cluster_sums,
    mcnemar_exact,
    mean_stderr,
    minimum_detectable_effect,
    sign_flip_test,
    usable_clusters,
)


@dataclass(frozen=True)
class PairedComparison:
    """Two systems' scores on the same ``n`` documents; scores are means, in the metric's unit.

    Attributes:
        n: documents.
        baseline, steered: mean scores.
        baseline_stderr, steered_stderr: standard errors of the means (``None`` when n < 2).
        difference: steered minus baseline.
        low, high: 95 % interval of the difference (``None`` when it cannot be given).
        p_value: two-sided.
        wins, losses: documents on which steered scored higher (lower).
        mde: smallest true difference found with 80 % power (``None`` where there is none).
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
    """Compare scores paired by position, choosing the methods by the kind of score.

    Outcomes that are all 0 or 1: exact McNemar and Bonett-Price. Other scores: sign-flip test over
    documents and paired bootstrap. With usable clusters: sign-flip test and interval over clusters.

    Raises:
        ValueError: unequal lengths, nothing to compare, or a score that is not finite.
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
        n, float(before.mean()), float(after.mean()), mean_stderr(before), mean_stderr(after),
        float(after.mean() - before.mean()), low, high, p, wins, losses, mde, *names, units,
    )  # fmt: skip
