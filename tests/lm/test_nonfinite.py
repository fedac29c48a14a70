"""Answers that are no numbers are told, with the cause; and thinking before given answers is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_aft import AFTError, SteeringVector
from lm_eval_aft.lm import AFTLM

OPTIONS: dict[str, Any] = {"device": "cpu", "batch_size": 4}
TEXTS = ("Question one Answer", "two three four Answer", "the small dog sees")
ASK = [Instance("loglikelihood", {}, (text, " yes"), i) for i, text in enumerate(TEXTS)]
WRITE = [Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": 4}), 0) for text in TEXTS]
ROLL = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("kind", "requests"), [("loglikelihood", ASK), ("loglikelihood_rolling", ROLL), ("generate_until", WRITE)]
)
def test_overflow_is_told_with_its_cause(
    checkpoint: Callable[..., str], kind: str, requests: Any, fast: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vector = SteeringVector({1: torch.ones(32)}, coefficient=90000.0)
    lm = AFTLM(checkpoint("llama"), dtype="float16", fast=fast, vector=vector, **OPTIONS)
    getattr(lm, kind)(requests, disable_tqdm=True)
    told = [each.message for each in caplog.records if "say nothing" in each.message]
    assert len(told) == 1
    assert f"Answers of {checkpoint('llama')} are NaN or infinite" in told[0]
    assert "Use bfloat16 or float32, or a weaker vector (its coefficient is 90000)." in told[0]
    lm.steer(None)
    caplog.clear()
    getattr(lm, kind)(requests, disable_tqdm=True)
    assert "say nothing" not in caplog.text


def test_a_baseline_that_overflows_blames_the_dtype(
    checkpoint: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    lm = AFTLM(checkpoint("llama"), dtype="float16", **OPTIONS)
    torch.nn.init.constant_(lm.model.get_submodule("model.layers.0.mlp.down_proj").weight, 60000.0)
    lm.loglikelihood(ASK, disable_tqdm=True)
    assert "say nothing: float16 holds no number above 65,504. Use bfloat16 or float32." in caplog.text


def test_thinking_is_refused_for_given_answers(checkpoint: Callable[..., str]) -> None:
    thinking = AFTLM(checkpoint("llama"), enable_thinking="yes", think_end_token="yes", **OPTIONS)
    ask = [Instance("loglikelihood", {}, each.args, 0, ("some_task", 0, 1)) for each in ASK]
    with pytest.raises(
        AFTError, match="enable_thinking=true is for tasks that generate, and some_task scores"
    ):
        thinking.loglikelihood(ask)
    assert AFTLM(checkpoint("llama"), enable_thinking="no", **OPTIONS).loglikelihood(ask)
