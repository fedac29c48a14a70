"""Statistics for two scores of the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class PairedComparison:
    """Two systems' right-or-wrong outcomes on the same documents.

    Attributes:
        n: documents.
        baseline, steered: share answered right, between 0 and 1.
        wins, losses: documents only the steered (only the baseline) run answered right.
        p_value: exact two-sided McNemar p.
    """

    n: int
    baseline: float
    steered: float
    wins: int
    losses: int
    p_value: float

    @property
    def difference(self) -> float:
        """Steered minus baseline, as a share."""
        return self.steered - self.baseline


def mcnemar_exact(wins: int, losses: int) -> float:
    """Exact two-sided McNemar p-value.

    Under the null each discordant document is as likely a win as a loss, so wins follow
    Binomial(wins + losses, 1/2) (McNemar 1947, Psychometrika 12:153-157; exact form in Fay 2010,
    Biostatistics 11:373-374). Without discordant documents p is 1.

    Raises:
        ValueError: a negative count.
    """
    if wins < 0 or losses < 0:
        raise ValueError("counts of wins and losses cannot be negative")
    if wins + losses == 0:
        return 1.0
    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def compare_binary(baseline: Sequence[float], steered: Sequence[float]) -> PairedComparison:
    """Compare outcomes of 0 or 1, paired by position.

    Raises:
        ValueError: unequal lengths, nothing to compare, or outcomes other than 0 and 1.
    """
    if len(baseline) != len(steered):
        raise ValueError(f"{len(baseline)} outcomes cannot be paired with {len(steered)}")
    if not baseline:
        raise ValueError("there is nothing to compare")
    if any(outcome not in (0, 1) for outcome in (*baseline, *steered)):
        raise ValueError("McNemar's test needs outcomes of 0 or 1")
    wins = sum(after > before for before, after in zip(baseline, steered, strict=True))
    losses = sum(after < before for before, after in zip(baseline, steered, strict=True))
    n = len(baseline)
    return PairedComparison(
        n,
        math.fsum(baseline) / n,
        math.fsum(steered) / n,
        wins,
        losses,
        mcnemar_exact(wins, losses),
    )
