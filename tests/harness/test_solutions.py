"""Solutions: pass@k, duplicates, the summary of an evaluation, and their file."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from lm_eval_aft import AFTError
from lm_eval_aft.harness.grading import (
    Solution,
    SolveRates,
    distinct_right,
    pass_at_k,
    read_solutions,
    write_solutions,
)
from lm_eval_aft.training.recipe import RFTSettings, TrainingPlan


@pytest.mark.parametrize("tried", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(tried: int) -> None:
    for right in range(tried + 1):
        marks = [i < right for i in range(tried)]
        for k in range(1, tried + 1):
            subsets = [any(subset) for subset in combinations(marks, k)]
            assert pass_at_k(tried, right, k) == pytest.approx(sum(subsets) / len(subsets))


def test_each_wording_is_kept_once_per_problem() -> None:
    solutions = [
        Solution(3, " a", True, greedy=True),
        Solution(3, " b", True),
        Solution(3, " wrong", False),
        Solution(3, " b ", True),
        Solution(3, " c", True),
        Solution(3, "  ", True),
        Solution(4, " b", True),
    ]
    assert distinct_right(solutions) == [solutions[1], solutions[4], solutions[6]]


def test_standing_averages_over_problems() -> None:
    right = {0: [True, False, False], 1: [False, False, False], 2: [True, True, True]}
    solutions = [Solution(i, "x", mark) for i, marks in right.items() for mark in marks]
    solutions += [Solution(i, "x", i == 2, greedy=True) for i in right]
    standing = SolveRates.of(solutions)
    assert (standing.greedy, standing.problems) == (pytest.approx(1 / 3), 3)
    expected = {"1": (1 / 3 + 0 + 1) / 3, "2": (2 / 3 + 0 + 1) / 3, "3": 2 / 3}
    assert standing.pass_at == {k: pytest.approx(share) for k, share in expected.items()}


def test_file_comes_back_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rft-round-1.jsonl"
    solutions = [Solution(1, " é\n\u2028", True), Solution(2, "", False, greedy=True)]
    write_solutions(path, solutions)
    assert read_solutions(path) == solutions
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    path.write_text('{"doc_id": 1, "te')
    with pytest.raises(AFTError, match="is damaged"):
        read_solutions(path)


def test_settings_belong_to_the_objective() -> None:
    plan = TrainingPlan.of("gsm8k", objective="rft", rft_samples=2, rft_filter=None)
    assert plan.rft == RFTSettings(samples=2)
    assert TrainingPlan.of("gsm8k", rft_samples=None).rft is None
    with pytest.raises(AFTError, match="Add --objective rft"):
        TrainingPlan.of("gsm8k", rft_samples=2)
    for wrong in ({"rft_samples": 0}, {"rft_rounds": 0}, {"rft_temperature": 0.0}):
        with pytest.raises(AFTError, match="is invalid"):
            TrainingPlan.of("gsm8k", objective="rft", **wrong)
