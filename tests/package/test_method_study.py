"""The intervals of scripts/method_study.py: what they claim to cover they cover."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from tests.support.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "method_study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("method_study")


def test_over_draws_it_is_the_t_interval(study: ModuleType) -> None:
    rows = np.random.default_rng(0).integers(-1, 2, size=(5, 40)).astype(float)
    expected = ttest_1samp(100 * rows.mean(axis=1), 0).confidence_interval(0.95)
    mean, low, high = study.interval(rows.tolist())
    assert mean == pytest.approx(100 * rows.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_only_the_wide_interval_covers_documents(study: ModuleType) -> None:
    """Draws share their documents: with few of these, an interval over draws alone is too narrow."""
    generator = np.random.default_rng(1)
    covered = {False: 0, True: 0}
    worlds = 200
    for _ in range(worlds):
        draws, documents = generator.normal(0, 0.05, size=(10, 1)), generator.normal(0, 0.5, size=(1, 60))
        rows = (draws + documents + generator.normal(0, 0.5, size=(10, 60))).tolist()
        for wide in covered:
            _, low, high = study.interval(rows, documents=wide)
            covered[wide] += low <= 0 <= high
    assert covered[False] / worlds < 0.75
    assert 0.93 < covered[True] / worlds < 0.995


@pytest.mark.parametrize("task", ["aft_demo_choice", "aft_demo_math"])
def test_no_size_takes_many_more_steps(study: ModuleType, task: str) -> None:
    for size in (50, 100, 400, 2000):
        recipe = study.sized(task, size)
        assert 1 <= recipe["epochs"] <= study.EPOCHS[task]
        assert recipe["epochs"] * size / study.RECIPE["batch_size"] <= 500
        assert all(0 < rung.train <= 1 for rung in recipe["rungs"])
