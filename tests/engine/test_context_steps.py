"""How passes over prompts are padded."""

from __future__ import annotations

import pytest
import torch

from lm_eval_aft.engine.generation import prompt
from lm_eval_aft.engine.rows import Step
from lm_eval_aft.engine.scorer import context_steps
from lm_eval_aft.steering.intervention import PADDING

CPU = torch.device("cpu")


def only_step(lengths: list[int], prefix: int = 0, columns: int = 0) -> Step:
    """The one pass that contexts of these lengths make."""
    prompts = [prompt(n, range(1, length + 2)) for n, length in enumerate(lengths)]
    (step,) = context_steps(prompts, prefix, max(lengths) * len(lengths), CPU, columns)
    return step


@pytest.mark.parametrize(
    ("length", "columns", "width"),
    [(100, 200, 104), (96, 200, 96), (1413, 1478, 1472), (1413, 1420, 1420), (1413, 0, 1413), (5, 70, 8)],
)
def test_a_prompt_by_itself_is_padded_once(length: int, columns: int, width: int) -> None:
    """To what every product would pad it to, as far as there are columns."""
    step = only_step([length], 0, columns)
    ids = step.inputs["input_ids"]
    assert ids.shape == (1, width)
    assert ids[0, :length].tolist() == list(range(1, length + 1))
    assert step.roles is not None
    assert (step.roles[0] == PADDING).tolist() == [False] * length + [True] * (width - length)


@pytest.mark.parametrize(("columns", "width"), [(200, 56), (101, 51), (0, 50)])
def test_behind_a_prefix_it_is_padded_as_far_as_columns_go(columns: int, width: int) -> None:
    step = only_step([100], 50, columns)
    assert step.inputs["input_ids"].shape == (1, width)
    assert step.start == 50


def test_prompts_together_are_as_wide_as_the_longest() -> None:
    assert only_step([29, 27], 0, 200).inputs["input_ids"].shape == (2, 29)
