"""The script that shows what choosing on the reported documents manufactures."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("selection_noise")


def test_more_in_common_leaves_less_to_choose(script: ModuleType) -> None:
    """24 independent layers of 30 documents: the largest of 24 normal numbers is 1.95 on average."""
    apart = script.simulate(script.Assumption(0.3, 0.0, 0.0, 0.0), 600)
    alike = script.simulate(script.Assumption(0.3, 0.7, 0.05, 0.1), 600)
    same = script.simulate(script.Assumption(0.3, 1.0, 0.0, 0.0), 20)
    assert apart["best_layer"] == pytest.approx(100 * 1.95 * (0.3 * 0.7 / 30) ** 0.5, abs=1.5)
    assert apart["best_layer"] > alike["best_layer"] > 5
    assert apart["best_final"] > alike["best_final"] > 3
    assert alike["positive"] > 0.85
    assert (same["best_layer"], same["best_final"], same["positive"]) == (0, 0, 0)


def test_only_the_biased_choice_gains_from_labels_that_mean_nothing(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    shape = (4, script.SEEDS, script.EPOCHS)
    trained = script.Trained(
        baseline=rng.integers(0, 4, 100),
        states=rng.integers(0, 4, (*shape, 100)),
        close=np.zeros((*shape, 100), dtype=bool),
        selection=rng.random(shape),
        vectors={},
        gold=np.zeros(100, dtype=np.int64),
        options=np.full(100, 4),
        metadata={},
    )
    found = script.redraw(trained, 300)
    assert found["biased"]["mean_gain"] > 5
    assert found["biased"]["positive"] > 0.9
    assert abs(found["honest"]["mean_gain"]) < 1.5
    right = np.zeros((*shape, 100), dtype=bool)
    right[2, 0, 1, :30] = True  # wins the layer on the first documents
    right[2, 1, 7, :60] = True  # wins on all of them
    assert script.chosen_biased(right) == (2, 1, 7)
