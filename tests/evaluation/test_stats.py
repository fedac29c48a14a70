"""Statistics, against independent implementations, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from lm_eval_aft.evaluation import stats
from lm_eval_aft.evaluation.stats import compare_paired

counts = st.integers(0, 400)
shares = st.floats(0, 1, allow_nan=False)


@given(counts, counts)
def test_mcnemar_equals_statsmodels(wins: int, losses: int) -> None:
    table = [[7, wins], [losses, 9]]
    assert stats.mcnemar_exact(wins, losses) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)


@given(st.integers(0, 10), st.integers(0, 10))
def test_mcnemar_equals_enumeration(wins: int, losses: int) -> None:
    """All ways the discordant documents could have fallen, those as uneven or more counted."""
    m = wins + losses
    uneven = sum(math.comb(m, k) for k in range(m + 1) if abs(2 * k - m) >= abs(wins - losses))
    assert stats.mcnemar_exact(wins, losses) == pytest.approx(uneven / 2**m)


def test_mcnemar_of_many_documents_stays_exact() -> None:
    expected = scipy.stats.binomtest(20_300, 40_000).pvalue
    assert stats.mcnemar_exact(20_300, 19_700) == pytest.approx(expected, rel=1e-9)


@given(counts, counts, st.integers(2, 2000))
def test_bonett_price_follows_from_two_added_pairs(wins: int, losses: int, rest: int) -> None:
    """The interval is Wald's after one win and one loss were added."""
    n = wins + losses + rest
    bounds = stats.bonett_price_interval(wins, losses, n)
    assert bounds is not None
    added = np.concatenate([np.ones(wins + 1), -np.ones(losses + 1), np.zeros(rest)])
    half = scipy.stats.norm.ppf(0.975) * added.std(ddof=0) / math.sqrt(added.size)
    assert bounds == pytest.approx((max(-1, added.mean() - half), min(1, added.mean() + half)))
    mirrored = stats.bonett_price_interval(losses, wins, n)
    assert mirrored == pytest.approx((-bounds[1], -bounds[0]))


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_equals_statsmodels(successes: int, extra: int) -> None:
    n = successes + extra
    low, high = proportion_confint(successes, n, method="wilson")
    assert stats.wilson_interval(successes, n) == pytest.approx((max(0, low), min(1, high)))


@settings(max_examples=12)  # the oracle takes a tenth of a second a call
@given(st.lists(shares, min_size=3, max_size=12))
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    assert stats.holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_sign_flip_equals_enumeration(sums: list[int]) -> None:
    observed = abs(sum(sums))
    patterns = [
        abs(sum(s * d for s, d in zip(signs, sums, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    expected = sum(value >= observed for value in patterns) / len(patterns)
    assert stats.sign_flip_test(sums) == pytest.approx(expected)


def test_sign_flip_of_single_documents_is_mcnemar() -> None:
    """Both ways round the drawn patterns: enumerated up to 16 units, normal beyond 5,000."""
    for wins, losses, tolerance in ((9, 3, 1e-9), (40, 22, 0.004), (4000, 3800, 0.001)):
        units = [1.0] * wins + [-1.0] * losses
        exact = stats.mcnemar_exact(wins, losses)
        assert stats.sign_flip_test(units, draws=9_999 * 4) == pytest.approx(exact, abs=tolerance)
    # The drawn p is never 0 and depends on the seed alone.
    units = [1.0] * 60
    assert stats.sign_flip_test(units, draws=999) == 1 / 1000
    mixed = list(np.random.default_rng(0).normal(0.2, 1, 40))
    assert stats.sign_flip_test(mixed, seed=1, draws=999) == stats.sign_flip_test(mixed, seed=1, draws=999)


def test_bootstrap_agrees_with_scipy_and_its_seed() -> None:
    d = np.random.default_rng(3).exponential(1, 300) - 0.8
    ours = stats.bootstrap_interval(d, seed=5)
    assert ours is not None
    assert ours == stats.bootstrap_interval(d, seed=5) != stats.bootstrap_interval(d, seed=6)
    theirs = scipy.stats.bootstrap(
        (d,), np.mean, n_resamples=9_999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_cluster_interval_equals_a_cluster_robust_regression() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    d = rng.normal(0, 1, groups.size) + rng.normal(0, 1, 60)[groups]
    fit = sm.OLS(d, np.ones_like(d)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}, use_t=True
    )
    half = scipy.stats.t.ppf(0.975, 59) * fit.bse[0] * math.sqrt(60 / 59)
    low, high = stats.cluster_interval(d, list(groups)) or (0, 0)
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_clusters_are_used_only_when_many_and_small() -> None:
    assert not stats.usable_clusters(["a"] * 500 + ["b"] * 500)  # as in the HellaSwag file
    assert stats.usable_clusters([i % 50 for i in range(1000)])
    assert not stats.usable_clusters([i % 49 for i in range(1000)])
    assert not stats.usable_clusters([0] * 50 + list(range(1, 951)))  # the largest holds 5 %
    assert stats.usable_clusters([0] * 49 + list(range(1, 952)))
    assert not stats.usable_clusters([None, *range(1000)])
    d = [1.0] * 200 + [0.0] * 800
    clustered = compare_paired([0.0] * 1000, d, [i // 10 for i in range(1000)])
    assert (clustered.clusters, clustered.test) == (100, "sign-flip over clusters")
    assert clustered.p_value > compare_paired([0.0] * 1000, d).p_value


@pytest.mark.parametrize(
    ("n", "discordance"), [(50, 0.5), (200, 0.2), (1000, 0.1), (1172, 0.3), (10_000, 0.2)]
)
def test_minimum_detectable_effect_is_found_four_times_in_five(n: int, discordance: float) -> None:
    effect = stats.minimum_detectable_effect(n, discordance)
    assert effect is not None
    rng = np.random.default_rng(n)
    draws = rng.multinomial(
        n, [(discordance + effect) / 2, (discordance - effect) / 2, 1 - discordance], 4000
    )
    found = np.mean([_significant(int(won), int(lost)) for won, lost, _ in draws])
    assert found == pytest.approx(0.8, abs=0.025)
    # Asymptotically it is Connor's (1987, Biometrics 43:207-211) sample size, solved for the effect.
    if n == 10_000:
        a, b = scipy.stats.norm.ppf(0.975), scipy.stats.norm.ppf(0.8)
        needed = (a * math.sqrt(discordance) + b * math.sqrt(discordance - effect**2)) ** 2 / effect**2
        assert needed == pytest.approx(n, rel=0.03)


def test_minimum_detectable_effect_where_there_is_none() -> None:
    assert stats.minimum_detectable_effect(50, 0.0) is None
    assert stats.minimum_detectable_effect(30, 0.1) is None  # three flips can never be significant
    assert stats.minimum_detectable_effect(1, 1.0) is None


def test_nothing_and_one_document() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_paired([], [])
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_paired([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        compare_paired([math.nan], [1.0])
    with pytest.raises(ValueError, match="^3 wins and 3 losses of 5 documents cannot be$"):
        stats.bonett_price_interval(3, 3, 5)
    one = compare_paired([0.0], [1.0])
    assert (one.n, one.low, one.high, one.p_value, one.mde) == (1, None, None, 1.0, None)
    assert one.baseline_stderr is None
    half = compare_paired([0.25], [0.5])
    assert (half.low, half.high, half.p_value) == (None, None, 1.0)
    assert stats.cluster_interval([0.5, 0.5], ["a", "a"]) is None


def test_verdict_is_p_and_direction_alone() -> None:
    assert stats.verdict(0.049, 0.001) == "better"
    assert stats.verdict(0.049, -0.001) == "worse"
    assert stats.verdict(0.049, -0.001, higher_is_better=False) == "better"
    assert stats.verdict(0.05, 0.5) == "no detectable difference"
    assert stats.verdict(0.001, 1.0) == "better"
    assert stats.verdict(0.001, 0.0) == "no detectable difference"
    assert stats.verdict(0.001, 0.0, higher_is_better=False) == "no detectable difference"


@pytest.mark.parametrize(
    ("n", "discordance", "difference"),
    [(0, 0.5, 0.1), (10, 0.0, 0.0), (10, 1.1, 0.5), (10, -0.1, 0.0), (10, 0.2, 0.3), (10, 0.2, -0.3)],
)
def test_power_of_what_cannot_be(n: int, discordance: float, difference: float) -> None:
    with pytest.raises(
        ValueError, match=r"power needs n >= 1 and \|difference\| <= discordance, both shares"
    ):
        stats.mcnemar_power(n, discordance, difference)


def test_power_at_the_ends_of_what_can_be() -> None:
    assert stats.mcnemar_power(1, 0.5, 0.5) == 0.0
    assert stats.mcnemar_power(20, 0.2, 0.2) > 0
    assert stats.mcnemar_power(20, 0.2, -0.2) == pytest.approx(stats.mcnemar_power(20, 0.2, 0.2))


def test_power_counts_what_the_verdict_calls_a_difference() -> None:
    # Five documents that all disagree, all won: p is 1/16, and a verdict wants p below alpha.
    assert stats.mcnemar_exact(5, 0) == 1 / 16
    for alpha, wanted in ((1 / 16, stats.NO_DIFFERENCE), (1 / 16 + 1e-9, stats.BETTER)):
        assert stats.verdict(1 / 16, 1.0, alpha=alpha) == wanted
        assert stats.mcnemar_power(5, 1.0, 1.0, alpha=alpha) == float(wanted == stats.BETTER)


@cache
def _significant(wins: int, losses: int) -> bool:
    return stats.mcnemar_exact(wins, losses) < 0.05


@pytest.mark.parametrize("n", [50, 200, 1000])
@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.2, 0.4, 0.8])
def test_false_positives_over_10000_null_draws(n: int, discordance: float) -> None:
    """At most 5.5 % significant where nothing changed."""
    rng = np.random.default_rng(round(1000 * discordance) + n)
    draws = rng.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 10_000)
    assert np.mean([_significant(int(won), int(lost)) for won, lost, _ in draws]) <= 0.055


@pytest.mark.parametrize("n", [20, 50, 200, 1000])
@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.2, 0.4, 0.8])
@pytest.mark.parametrize("lean", [0.0, 0.3, 0.8])
def test_interval_coverage(n: int, discordance: float, lean: float) -> None:
    """Exactly computed, not drawn: the sum of multinomial probabilities of covering tables."""
    difference = lean * discordance
    m = np.arange(n + 1)
    p_m = scipy.stats.binom.pmf(m, n, discordance)
    covered = 0.0
    for flips in m[p_m > 1e-9]:
        wins = np.arange(flips + 1)
        p_wins = scipy.stats.binom.pmf(wins, flips, (1 + lean) / 2)
        a, b = (wins + 1) / (n + 2), (flips - wins + 1) / (n + 2)
        half = scipy.stats.norm.ppf(0.975) * np.sqrt((a + b - (a - b) ** 2) / (n + 2))
        covered += float(p_m[flips] * p_wins[np.abs(a - b - difference) <= half].sum())
        if flips == round(n * discordance):  # the formula above is the product's
            middle = int(flips) // 2
            ours = stats.bonett_price_interval(middle, int(flips) - middle, n)
            assert ours == pytest.approx(
                (a[middle] - b[middle] - half[middle], a[middle] - b[middle] + half[middle])
            )
    assert covered >= 0.94
    if n >= 200 and 0.1 <= discordance <= 0.4:
        assert covered <= 0.965


def test_holm_keeps_the_family_error() -> None:
    """Six comparisons without an effect: any verdict at all in at most 5.5 % of 4,000 families."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(500, [0.1, 0.1, 0.8], (4000, 6))

    @cache
    def p(wins: int, losses: int) -> float:
        return stats.mcnemar_exact(wins, losses)

    families = [[p(int(won), int(lost)) for won, lost, _ in family] for family in draws]
    wrong = np.mean([min(stats.holm(family)) < 0.05 for family in families])
    assert wrong <= 0.055
    # Without the correction it would not hold, so the draw can tell.
    assert np.mean([min(family) < 0.05 for family in families]) > 0.15


@pytest.mark.slow
def test_false_positives_of_the_other_tests() -> None:
    """Sign flips over clusters and over continuous scores: the nominal rate, over 3,000 null draws."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 5)
    clustered = continuous = 0
    for seed in range(3000):
        d = rng.integers(-1, 2, 300) + rng.choice([-1, 1], 60)[groups] * rng.integers(0, 2, 60)[groups]
        clustered += stats.sign_flip_test(stats.cluster_sums(d.astype(float), list(groups)), seed, 999) < 0.05
        continuous += stats.sign_flip_test(rng.standard_t(3, 80), seed, 999) < 0.05
    assert 0.035 <= clustered / 3000 <= 0.062
    assert 0.035 <= continuous / 3000 <= 0.062


@settings(max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_compare_paired_counts(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = compare_paired(before, after)
    assert found.wins - found.losses == pytest.approx(found.difference * found.n)
    assert found.p_value == stats.mcnemar_exact(found.wins, found.losses)
    turned = compare_paired(after, before)
    assert (turned.wins, turned.losses, turned.p_value) == (found.losses, found.wins, found.p_value)


def scores(n: int, seed: int, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if binary:
        return rng.integers(0, 2, n).astype(float), rng.integers(0, 2, n).astype(float)
    before = rng.normal(size=n)
    return before, before + rng.normal(0.1, 1, n)


@pytest.mark.parametrize("n", [2, 3, 40])
def test_standard_errors_are_those_of_scipy(n: int) -> None:
    values, _ = scores(n, n, binary=False)
    assert stats.mean_stderr(list(values)) == pytest.approx(scipy.stats.sem(values))


def test_every_figure_of_a_binary_comparison_is_what_its_name_says() -> None:
    before, after = scores(300, 1, binary=True)
    found = compare_paired(list(before), list(after), seed=3)
    wins, losses = int(((after == 1) & (before == 0)).sum()), int(((after == 0) & (before == 1)).sum())
    assert 0 < wins != losses > 0
    assert (found.n, found.wins, found.losses, found.clusters) == (300, wins, losses, None)
    assert (found.baseline, found.steered) == (before.mean(), after.mean())
    assert found.difference == pytest.approx((wins - losses) / 300)
    assert found.baseline_stderr == pytest.approx(scipy.stats.sem(before))
    assert found.steered_stderr == pytest.approx(scipy.stats.sem(after))
    assert (found.low, found.high) == stats.bonett_price_interval(wins, losses, 300)
    assert found.p_value == stats.mcnemar_exact(wins, losses)
    assert found.mde == stats.minimum_detectable_effect(300, (wins + losses) / 300)
    assert found.mde is not None
    assert (found.test, found.interval) == ("exact McNemar", "Bonett-Price")


@pytest.mark.parametrize("half", ["before", "after"])
def test_every_figure_of_a_graded_comparison_is_what_its_name_says(half: str) -> None:
    before, after = scores(300, 2, binary=False)
    if half == "before":  # one side of zeros and ones does not make the pair binary
        after = np.round(np.clip(after, 0, 1))
        before += after.mean() - before.mean() - 0.1
    elif half == "after":
        before = np.round(np.clip(before, 0, 1))
        after += before.mean() - after.mean() + 0.1
    found = compare_paired(list(before), list(after), seed=3)
    assert (found.low, found.high) == stats.bootstrap_interval(after - before, seed=3)
    assert (found.low, found.high) != stats.bootstrap_interval(after - before)
    assert found.p_value == stats.sign_flip_test(after - before, 3)
    assert found.p_value != stats.sign_flip_test(after - before)
    assert (found.mde, found.clusters) == (None, None)
    assert found.baseline_stderr == pytest.approx(scipy.stats.sem(before))
    assert (found.test, found.interval) == ("sign-flip over documents", "paired bootstrap")
    default = compare_paired(list(before), list(after))
    assert default.p_value == stats.sign_flip_test(after - before, 0)


@pytest.mark.parametrize("binary", [True, False])
def test_every_figure_of_a_clustered_comparison_is_what_its_name_says(binary: bool) -> None:
    before, after = scores(300, 4, binary)
    names = [f"story {i // 3}" for i in range(300)]
    found = compare_paired(list(before), list(after), names, seed=3)
    sums = (after - before).reshape(100, 3).sum(axis=1)
    assert found.clusters == 100
    assert found.p_value == stats.sign_flip_test(sums, 3) != stats.sign_flip_test(sums)
    assert (found.low, found.high) == stats.cluster_interval(after - before, names)
    assert found.mde is None
    assert (found.test, found.interval) == ("sign-flip over clusters", "cluster-robust t")
    few = compare_paired(list(before), list(after), ["one"] * 300)
    assert few.clusters is None


def test_bootstrap_quantiles_and_the_smallest_sample() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(0.3, 1, 2000)
    for alpha in (0.05, 0.2):
        found = stats.bootstrap_interval(d, alpha=alpha)
        half = scipy.stats.norm.ppf(1 - alpha / 2) * scipy.stats.sem(d)
        assert found == pytest.approx((d.mean() - half, d.mean() + half), abs=0.05 * half)
    assert stats.bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    # With so many documents that draws come in several portions, each of them counts once.
    many = rng.normal(0, 1, 8000)
    assert stats.bootstrap_interval(many, draws=1501) != stats.bootstrap_interval(many, draws=1500)
    # Every document can be drawn, the first one too.
    first = stats.bootstrap_interval([100.0] + [0.0] * 4)
    assert first is not None
    assert first[1] > 0


def test_sign_flip_in_portions_and_beyond() -> None:
    rng = np.random.default_rng(1)
    for n in (17, 3000, 5000, 5001):
        d = rng.normal(0.5 / math.sqrt(n), 1, n)
        normal = 2 * scipy.stats.norm.sf(abs(d.sum()) / math.sqrt(float(np.square(d).sum())))
        assert stats.sign_flip_test(d, draws=20_000) == pytest.approx(normal, abs=0.04), n
    assert stats.sign_flip_test([1.0]) == 1.0
    # The observed pattern is among those drawn: p is never 0.
    assert stats.sign_flip_test([1.0] * 40, draws=99) == 1 / 100
    # A drawn sum as large as the observed one counts.
    assert stats.sign_flip_test([1.0, -1.0] * 9, draws=999) == 1.0


def test_two_clusters_are_enough_for_an_interval() -> None:
    d = [1.0, 0.0, 0.5, 0.0]
    low, high = stats.cluster_interval(d, ["a", "a", "b", "b"]) or (0.0, 0.0)
    # Deviations from 0.375 sum to +0.25 and -0.25.
    half = scipy.stats.t.ppf(0.975, 1) * math.sqrt(2 * (0.25**2 + 0.25**2)) / 4
    assert (low, high) == pytest.approx((0.375 - half, 0.375 + half))


def test_bounds_of_what_can_be() -> None:
    for pair in ((-1, 3), (3, -1)):
        with pytest.raises(ValueError, match="losses cannot be$"):
            stats.mcnemar_exact(*pair)
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="^p-values lie between 0 and 1$"):
            stats.holm([0.5, p])
    low, high = stats.wilson_interval(3, 3)
    assert low < 1
    assert high == 1.0
    with pytest.raises(ValueError, match="^a proportion of nothing has no interval$"):
        stats.wilson_interval(0, 0)
    with pytest.raises(ValueError, match="^there is nothing to compare$"):
        compare_paired([], [])
    with pytest.raises(ValueError, match="^scores must be finite numbers$"):
        compare_paired([math.nan], [1.0])
    # Everything discordant: nothing is left to chance but who wins.
    assert stats.mcnemar_power(10, 1.0, 1.0) == pytest.approx(1.0)
    reject = sum(math.comb(10, k) * 0.8**k * 0.2 ** (10 - k) for k in (0, 1, 9, 10))
    assert stats.mcnemar_power(10, 1.0, 0.6) == pytest.approx(reject)
    assert stats.minimum_detectable_effect(6, 1.0, power=0.5) == pytest.approx(
        2 * 0.5 ** (1 / 6) - 1, abs=1e-3
    )
