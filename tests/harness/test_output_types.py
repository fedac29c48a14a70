"""Output types: the table that training and listings read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lm_eval_aft import AFTError
from lm_eval_aft.harness.examples import Extractor, PromptSettings
from lm_eval_aft.harness.output_types import OUTPUT_TYPES, GenerateUntil
from lm_eval_aft.harness.tasks import TaskListing, load_task, scorable
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.training.objectives import OBJECTIVES


def test_a_new_output_type_is_known_everywhere(
    monkeypatch: pytest.MonkeyPatch, toy_tasks: Callable[..., str], checkpoint: Callable[..., str]
) -> None:
    lm = AFTLM(checkpoint("llama"), device="cpu")
    task = load_task("toy_generate", [toy_tasks()])
    task.OUTPUT_TYPE = "generate_backwards"
    listing = TaskListing("toy", "generate_backwards", "train", "test", ())
    with pytest.raises(AFTError, match="'generate_backwards', which cannot be trained on"):
        Extractor(task, lm, PromptSettings())
    assert not listing.trainable
    assert scorable({"toy": task})[1] == {"toy": "its requests have no context to remove"}

    class GenerateBackwards(GenerateUntil):
        name = "generate_backwards"
        not_alone = "its answers run backwards"

    monkeypatch.setitem(OUTPUT_TYPES, GenerateBackwards.name, GenerateBackwards())
    assert Extractor(task, lm, PromptSettings()).objective == "lm"
    assert listing.trainable
    assert scorable({"toy": task})[1] == {"toy": "its answers run backwards"}


def test_every_output_type_has_an_objective() -> None:
    assert {each.objective for each in OUTPUT_TYPES.values()} <= set(OBJECTIVES)
